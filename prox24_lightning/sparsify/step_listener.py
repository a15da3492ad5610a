"""Notice every real optimizer step, exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepListener:
    """Call ``on_step(optimizer)`` once after each step that really changed weights.

    It uses the optimizer's own post-step hook: the one place that fires under gradient accumulation, manual
    optimisation and several optimizers alike, and after the update. Two guards make it exact. A subclass whose
    ``step`` calls ``super().step()`` fires the hook twice: only the outermost call counts. A fused optimizer under a
    gradient scaler fires it for a skipped step, and marks it with ``found_inf``: such a step does not count.

    Args:
        on_step: what to call, with the optimizer that stepped.
    """

    def __init__(self, on_step: Callable[[Optimizer], None]) -> None:
        self._on_step = on_step
        self._depth: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []
        self._optimizers: tuple[Optimizer, ...] = ()

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Listen to exactly ``optimizers``; those listened to before are let go."""
        self.unbind()
        self._optimizers = tuple(optimizers)
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def unbind(self) -> None:
        """Remove every hook; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers = ()
        self._depth.clear()

    def listens_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the bound optimizers are these very objects."""
        return len(optimizers) == len(self._optimizers) and all(
            mine is theirs for mine, theirs in zip(self._optimizers, optimizers, strict=True)
        )

    def reset(self) -> None:
        """Forget steps that began and never ended: an exception inside a closure leaves one open."""
        self._depth.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        depth = self._depth.get(id(optimizer), 1) - 1
        self._depth[id(optimizer)] = depth
        if depth > 0:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf != 0):
            return
        self._on_step(optimizer)
