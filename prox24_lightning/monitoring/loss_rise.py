"""Tell a learning rate that is too high by the training loss of one run: it rises while no weight is pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.monitoring.training_loss import loss_of
from prox24_lightning.sparsify.phases import Phase
from prox24_lightning.weights.sharded import is_sharded

_ABOVE_LOWEST = 1.15
"""Recorded runs near their best rate rise by at most 14 % above their lowest loss since the freeze (8 steps each)."""
_ABOVE_START = 1.1
_ERRORS = 4.0
"""A difference counts from so many of its standard errors on."""
_SPREAD = 0.3
"""Losses whose standard deviation is a larger part of their mean show nothing: they are noisy, or near zero."""
_IN_A_ROW = 2
_FEWEST = 4
_PART, _SHORTEST, _LONGEST, _UNKNOWN = 0.02, 8, 64, 32


@dataclass(frozen=True)
class LossWindow:
    """The training loss of a few steps.

    Attributes:
        first: the first step, counted from 1.
        last: the last one.
        mean: of the losses.
        deviation: standard deviation of the single losses.
        count: number of losses.
        rates: learning rates after the last step, one a parameter group.
    """

    first: int
    last: int
    mean: float
    deviation: float = 0.0
    count: int = 1
    rates: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return max(self.rates, default=0.0)

    def is_faster(self, other: LossWindow) -> bool:
        """Return whether a group has a higher rate than in the other window, or there are other groups."""
        if len(self.rates) != len(other.rates):
            return True
        return any(rate > 1.01 * before for rate, before in zip(self.rates, other.rates, strict=True))

    @property
    def is_steady(self) -> bool:
        """Whether the mean is positive, and single losses are near it."""
        return self.mean > 0 and self.deviation <= _SPREAD * self.mean

    def exceeds(self, other: LossWindow, factor: float) -> bool:
        """Return whether the mean is above ``factor`` times the other's, and by more than noise."""
        error = math.hypot(self.deviation / math.sqrt(self.count), other.deviation / math.sqrt(other.count))
        return self.mean > factor * other.mean and self.mean - other.mean > _ERRORS * error

    def __str__(self) -> str:
        return f"{self.mean:.3g} (steps {self.first} to {self.last})"


@dataclass(frozen=True)
class RisenLoss:
    """A loss that has risen in the frozen phase.

    Attributes:
        start: the last window of the dense phase; the first of all windows if there is none.
        lowest: the lowest since the freeze.
        now: the last window of the rise.
        highest_rate: the highest learning rate so far.
    """

    start: LossWindow
    lowest: LossWindow
    now: LossWindow
    highest_rate: float

    def __str__(self) -> str:
        return (
            f"the training loss has risen to {self.now} from {self.lowest}, above {self.start} at the start, though "
            f"no weight was pruned and the learning rate ({self.now.rate:g} now, {self.highest_rate:g} at its highest) "
            f"did not rise: it is too high; stop, and set half of it ({self.highest_rate / 2:g}), or search it by "
            "prox24 compare --lrs (batches that become harder, as in data that is not shuffled, and a loss whose terms "
            "change look the same)"
        )


class LossRise:
    """Compare the loss of the frozen phase with its own lowest value and with the dense start.

    Pruning raises the loss, whatever the rate. After the freeze only the optimizer changes the model: a loss that rises
    there, at a rate that does not rise, and above where the run began, says that the rate is too high.
    """

    def __init__(self) -> None:
        self._start: LossWindow | None = None
        self._lowest: LossWindow | None = None
        self._highest_rate = 0.0
        self._high = 0

    @property
    def has_start(self) -> bool:
        """Whether there is a window to compare with."""
        return self._start is not None

    def add(self, window: LossWindow, phase: Phase) -> RisenLoss | None:
        """Take the next window; return the rise if it is sure now.

        Args:
            window: losses of one phase only.
            phase: that they belong to.
        """
        self._highest_rate = max(self._highest_rate, window.rate)
        if not math.isfinite(window.mean):
            return None
        if self._start is None or phase == "dense":
            self._start = window
        if phase != "frozen":
            self._lowest = None  # layers that have joined the run are pruned once more
            return None
        lowest = self._lowest
        if lowest is None or window.mean < lowest.mean or window.is_faster(lowest):
            self._lowest, self._high = window, 0
            return None
        steady = self._highest_rate > 0 and self._start.is_steady and lowest.is_steady
        risen = steady and window.exceeds(lowest, _ABOVE_LOWEST) and window.exceeds(self._start, _ABOVE_START)
        self._high = self._high + 1 if risen else 0
        if self._high < _IN_A_ROW:
            return None
        return RisenLoss(self._start, lowest, window, self._highest_rate)


class RateWatch:
    """Sum up losses window by window on their device, and compare the windows.

    Args:
        steps: length of the run; ``inf`` or negative if it is not known.
        values_per_step: losses of one optimizer step; below 1 if a loss is a mean over several steps.
        step: optimizer steps that are done already.
    """

    def __init__(self, steps: float, values_per_step: float = 1.0, step: int = 0) -> None:
        known = math.isfinite(steps) and steps >= 0
        window = min(max(round(_PART * steps), _SHORTEST), _LONGEST) if known else _UNKNOWN
        self._length = max(round(window * values_per_step), _FEWEST)
        self._rise = LossRise()
        self._phase: Phase | None = None
        self._sums: Tensor | None = None
        self._count = 0
        self._step = self._first = step
        self._done = False

    def add(
        self, outputs: Any, step: int, phase: Phase, groups: Iterable[dict[str, Any]], factor: float = 1.0
    ) -> RisenLoss | None:
        """Take the loss of a batch; return the rise once, when it is sure.

        Args:
            outputs: a scalar, or a mapping with ``"loss"``; others are left out.
            step: optimizer steps that are done after the batch.
            phase: of the run after the batch: the losses of the next ones belong to it.
            groups: the optimizers' parameter groups.
            factor: of the loss.
        """
        if self._done:
            return None
        before, self._phase = self._phase or phase, phase
        first, self._step = self._step + 1, step  # the step that this loss belongs to
        risen = None
        loss = loss_of(outputs)
        # A collective on this rank alone would wait for ever.
        if loss is not None and not is_sharded(loss) and (before != "sparsify" or not self._rise.has_start):
            value = factor * loss.detach().reshape(()).to(torch.float32)
            sums = torch.stack([value, value * value])
            self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
            self._first = self._first if self._count else first
            self._count += 1
            if self._count == self._length or (before != phase and self._count >= _FEWEST):
                risen = self._rise.add(self._take(step, groups), before)
                self._done = risen is not None
        if before != phase:
            self._forget()
        return risen

    def _take(self, last: int, groups: Iterable[dict[str, Any]]) -> LossWindow:
        assert self._sums is not None
        count = self._count
        mean, square = (self._sums / count).tolist()
        deviation = math.sqrt(max(square - mean * mean, 0.0) * count / (count - 1))
        self._forget()
        rates = tuple(float(group.get("lr") or 0.0) for group in groups)  # None: the optimizer finds its own
        return LossWindow(self._first, last, mean, deviation, count, rates)

    def _forget(self) -> None:
        self._sums, self._count = None, 0
