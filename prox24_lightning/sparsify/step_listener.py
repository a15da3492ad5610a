"""Notice every real optimizer step, exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prox24_lightning.finetune.optimizers import wrapped_optimizers
from prox24_lightning.weights.sharded import local_part

PATIENCE = 3
"""Batches that may change weights before the first step is noticed: a module may write to weights on its own."""
_SAMPLE = 16


class StepListener:
    """Call ``on_step(optimizer)`` once after each step that really changed weights.

    It uses the optimizers' own step hooks: the one place that fires under gradient accumulation, manual optimisation
    and several optimizers alike, and after the update. Three guards make it exact. A step inside of another one, of a
    subclass that calls ``super().step()`` or of an optimizer that wraps another, does not count beside it. A wrapped
    optimizer that steps on its own does (SAM's ``second_step`` steps its base alone). A fused optimizer under a
    gradient scaler fires for a skipped step and marks it with ``found_inf``: such a step does not count.

    Args:
        on_step: called with the optimizer that stepped; if it is wrapped, with the outermost one.
    """

    def __init__(self, on_step: Callable[[Optimizer], None]) -> None:
        self._on_step = on_step
        self._depth: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []
        self._optimizers: tuple[Optimizer, ...] = ()
        self._noticed = False
        self._sample: Tensor | None = None
        self._changed_batches = 0

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Listen to exactly ``optimizers`` and those that they wrap."""
        self.unbind()
        self._optimizers = tuple(optimizers)
        heard: set[int] = set()
        for outer in self._optimizers:
            for optimizer in wrapped_optimizers(outer):
                if id(optimizer) not in heard:
                    heard.add(id(optimizer))
                    self._handles.append(optimizer.register_step_pre_hook(partial(self._before, outer)))
                    self._handles.append(optimizer.register_step_post_hook(partial(self._after, outer)))

    def unbind(self) -> None:
        """Remove every hook; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers = ()
        self._depth.clear()
        self._noticed, self._sample, self._changed_batches = False, None, 0

    def listens_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether the bound optimizers are these very objects."""
        return len(optimizers) == len(self._optimizers) and all(
            mine is theirs for mine, theirs in zip(self._optimizers, optimizers, strict=True)
        )

    def before_batch(self, weights: Iterable[Tensor]) -> None:
        """Forget steps that began and never ended (an exception in a closure), and look for steps without a hook.

        Raises:
            RuntimeError: if the weights change from batch to batch, yet no optimizer has ever announced a step.
        """
        self._depth.clear()
        if self._noticed:
            return
        samples = [local_part(weight).flatten()[:_SAMPLE].float().nan_to_num() for weight in weights]
        sample = torch.cat([part.to(samples[0].device) for part in samples]) if samples else torch.empty(0)
        # Modules may normalise their weights in forward, which rounds them anew.
        if self._sample is not None and self._sample.shape == sample.shape and not torch.allclose(self._sample, sample):
            self._changed_batches += 1
        self._sample = sample
        if self._changed_batches >= PATIENCE:
            names = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers)
            raise RuntimeError(
                f"the weights have changed in {PATIENCE} batches, but none of the optimizers ({names}) has announced a "
                "step: they update weights outside of step(), so their steps cannot be counted; step them by step()"
            )

    def _before(self, outer: Optimizer, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[id(outer)] = self._depth.get(id(outer), 0) + 1

    def _after(self, outer: Optimizer, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        depth = self._depth.get(id(outer), 1) - 1
        self._depth[id(outer)] = depth
        if depth > 0:
            return
        self._noticed, self._sample = True, None
        if any(_is_skipped(part) for part in (outer, optimizer)):
            return
        self._on_step(outer)


def _is_skipped(optimizer: Optimizer) -> bool:
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf != 0)
