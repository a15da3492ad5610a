"""Pure functions of progress: how a value moves while the sparsification phase runs from 0 to 1.

One family serves two purposes: the prox's strength (relative to a layer's weight scale), and the fraction of
groups that are 2:4 under ``schedule="auto"``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """A value for every progress in [0, 1]; outside of that range, the value of the nearer end."""

    def __call__(self, progress: float) -> float:
        return self.at(min(max(progress, 0.0), 1.0))

    @abstractmethod
    def at(self, progress: float) -> float:
        """The value at ``progress``, which lies in [0, 1]."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout."""

    value: float

    def __post_init__(self) -> None:
        _check(value=self.value)

    def at(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``start`` to ``end`` in equal steps."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)

    def at(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cubic(Schedule):
    """``end + (start - end) (1 - progress)^3``: fast at first, slow towards the end (Zhu and Gupta, 1710.01878)."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)

    def at(self, progress: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - progress) ** 3


@dataclass(frozen=True)
class Exponential(Schedule):
    """From ``start`` to ``end`` by a constant factor a step; both are positive."""

    start: float = 0.01
    end: float = 100.0

    def __post_init__(self) -> None:
        _check(start=self.start, end=self.end)
        if self.start <= 0 or self.end <= 0:
            raise ValueError(f"an exponential schedule needs positive ends, got start={self.start} and end={self.end}")

    def at(self, progress: float) -> float:
        return math.exp(math.log(self.start) * (1.0 - progress) + math.log(self.end) * progress)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"a schedule's {name} must be finite and not negative, got {value}")


STRENGTH_SCHEDULES: dict[str, Schedule] = {
    "exponential": Exponential(0.01, 100.0),
    "linear": Linear(0.0, 3.0),
    "cubic": Cubic(0.0, 3.0),
    "constant": Constant(0.5),
}
"""Named strength schedules; values in units of 1 / rms of the layer's weights (in the metric's coordinates)."""

FRACTION_CURVES: dict[str, Schedule] = {"linear": Linear(), "cubic": Cubic()}
"""Named curves from 0 to 1 for the fraction of groups that are 2:4."""


def named_schedule(value: str | Schedule, table: dict[str, Schedule], argument: str) -> Schedule:
    """Return the schedule of this name; a schedule object passes through.

    Raises:
        ValueError: for a name that is not in ``table``; ``argument`` names the setting.
        TypeError: for anything else.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{argument} takes a name or a Schedule, got {value!r}")
    if value not in table:
        raise ValueError(f"{argument}={value!r} is unknown; use one of {', '.join(table)}, or a Schedule object")
    return table[value]
