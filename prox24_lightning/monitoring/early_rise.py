"""Tell a learning rate that is too high before anything is pruned: the model gets worse on new batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prox24_lightning.monitoring.loss_since_start import LossSinceStart

_RISE, _LEAST = 0.05, 0.01
"""A rise counts from this part of the loss before the run on, and from this many nats: a model that has converged gets
worse at first by up to 5 % at the best of its rates; where a loss is near zero, its part says nothing."""
_SAME = 0.005
"""How far the copy may be from the model before the first step, relative to the loss: it computes something else."""
_ERRORS = 3.0
"""A rise counts from so many of its standard errors on."""
_PART = 0.05
"""The rise is measured up to this part of the run, by when most schedules have reached their highest rate."""
_BATCHES, _FEWEST, _JUDGED = 12, 4, 6
"""Batches that are compared at most, those that a verdict needs, and the last ones that it is taken on."""


@dataclass(frozen=True)
class EarlyRise:
    """How the loss on new batches has changed by training alone.

    Attributes:
        step: optimizer steps that were done.
        now: mean loss of the model on batches that it had not trained on.
        start: mean loss on the same batches of the model before the run.
        error: standard error of the difference.
        least: the smallest difference of a single batch.
        rate: the learning rate then, the largest of all groups.
    """

    step: int
    now: float
    start: float
    error: float
    least: float
    rate: float

    @property
    def share(self) -> float:
        """The rise, relative to the loss before the run; negative if the loss has fallen."""
        return (self.now - self.start) / self.start if self.start > 0 else 0.0

    @property
    def is_too_high(self) -> bool:
        """Whether the rise is large, and surely no noise: far above its error, or the loss of every batch has risen."""
        rise = self.now - self.start
        is_large = self.share > _RISE and rise > _LEAST
        return is_large and (rise > _ERRORS * self.error or self.least > _RISE * self.start)

    def __str__(self) -> str:
        change = f"{abs(self.share):.1%} {'above' if self.share > 0 else 'below'}"
        return (
            f"after step {self.step}, with nothing pruned yet, the loss on batches that the model has not trained on "
            f"is {self.now:.4g}, {change} that of the model before the run on the same batches ({self.start:.4g})"
        )

    @property
    def advice(self) -> str:
        """What a rise that is too high means, and what to set."""
        return (
            f"the learning rate ({self.rate:g}) is probably too high for this model; try half of it "
            f"({self.rate / 2:g}), or search it by prox24 compare --lrs"
        )


class EarlyWatch:
    """Compare the loss of a few batches, before they are trained on, with that of the model as it was.

    In steady training the loss of a batch that is new says more than a mean of the training loss: batches differ by
    more than a rate that is too high does, and the same batches do not.

    Args:
        make: makes the comparison, before the first step.
        steps: length of the run; ``inf`` or negative if it is not known.
        start: the last step at which surely nothing is pruned.
    """

    def __init__(self, make: Callable[[], LossSinceStart], steps: float, start: float) -> None:
        known = math.isfinite(steps) and steps >= 0
        self._last = math.floor(min(start, _PART * steps) if known else start)
        stride = max(1, (self._last - self._last // 2) // _BATCHES)
        self._steps = set(range(self._last, self._last // 2, -stride))
        self._checked = False
        self._pairs: list[tuple[float, float]] = []
        self._losses: LossSinceStart | None = None
        if len(self._steps) >= _FEWEST:
            try:
                self._losses = make()
            except Exception:  # of the user's classes: other signs of a rate that is too high remain
                self._losses = None
        self._listening = False
        self._rate = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether no batch is compared any more."""
        return self._losses is None

    def begin_batch(self, step: int, batch: Any = None) -> None:
        """A training batch begins, of the step after ``step``, in which targets may be."""
        first = step == 0 and not self._checked
        self._listening = self._losses is not None and (first or step + 1 in self._steps)
        if not self._listening or self._losses is None:
            return
        self._steps.discard(step + 1)  # of batches that accumulate the first
        try:
            self._losses.listen(batch)
        except Exception:  # of the user's batch
            self.close()

    def end_batch(
        self, step: int, is_dense: bool, groups: Iterable[dict[str, Any]], minimised: Tensor | None = None
    ) -> EarlyRise | None:
        """The batch has ended; return the rise once, when it is known.

        Args:
            step: optimizer steps that are done now.
            is_dense: whether still nothing is pruned.
            groups: the optimizers' parameter groups.
            minimised: the loss that training minimised on the batch; None if it is not known.
        """
        if self._losses is None:
            return None
        if self._listening:
            self._listening = False
            try:
                self._rate = max((float(group.get("lr") or 0.0) for group in groups), default=0.0)
                self._compare(self._losses, minimised)
            except Exception:  # of the user's forward, or for want of memory
                self.close()
                return None
        if is_dense and step < self._last:
            return None
        self.close()
        return self._judged(step)

    def _compare(self, losses: LossSinceStart, minimised: Tensor | None) -> None:
        now, start = losses.compare(minimised)
        if self._checked:
            self._pairs.append((now, start))
            return
        self._checked = True
        losses.offload()
        if not abs(now - start) <= _SAME * abs(start):
            raise ValueError("the copy computes another loss than the model")

    def close(self) -> None:
        """Remove the hooks, and give the memory of the copy back."""
        if self._losses is not None:
            self._losses.close()
            self._losses = None

    def _judged(self, step: int) -> EarlyRise | None:
        pairs = [pair for pair in self._pairs[-_JUDGED:] if all(map(math.isfinite, pair))]
        if len(pairs) < _FEWEST:
            return None
        rises = [now - start for now, start in pairs]
        now, start = (statistics.fmean(side) for side in zip(*pairs, strict=True))
        error = statistics.stdev(rises) / math.sqrt(len(rises))
        return EarlyRise(step, now, start, error, min(rises), self._rate)
