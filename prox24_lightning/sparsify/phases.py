"""The steps at which the phases of a run begin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["dense", "sparsify", "frozen"]


@dataclass(frozen=True)
class PhasePlan:
    """Dense up to and including step ``start``, sparsify until ``freeze``, frozen from then on.

    Steps count finished optimizer steps: after step ``freeze`` the weights are 2:4. ``start == freeze`` is
    one-shot pruning, ``freeze == 0`` prunes before the first step.
    """

    start: int
    freeze: int

    def phase(self, step: int) -> Phase:
        """The phase once ``step`` optimizer steps are done."""
        if step >= self.freeze:
            return "frozen"
        return "sparsify" if step > self.start else "dense"

    def when(self) -> str:
        """The optimizer steps after which weights change to 2:4, in words."""
        if self.freeze == 0:
            return "before the first step"
        first = self.start + 1
        return f"after step {self.freeze}" if first >= self.freeze else f"after steps {first} to {self.freeze}"

    def progress(self, step: int) -> float:
        """How far the sparsify phase is after ``step`` steps: 0 at ``start``, 1 at ``freeze``."""
        return (step - self.start) / max(self.freeze - self.start, 1)


def check_step(value: int | float, argument: str) -> None:
    """Check a step as far as that needs no length of the run.

    Raises:
        ValueError: for a negative or non-finite step, or a fraction above 1.
        TypeError: for anything that is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} takes a step (int) or a fraction of the run (float), got {value!r}")
    if not math.isfinite(value) or value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(
            f"{argument}={value!r} must be a step (int >= 0) or a fraction of the run (float in [0, 1]); "
            f"write a whole number of steps as an int"
        )


def resolve_step(value: int | float, argument: str, total: int | float) -> int:
    """Turn a step (int) or a fraction of ``total`` optimizer steps (float) into a step.

    Args:
        value: of the argument.
        argument: its name, for errors.
        total: length of the run; ``inf`` or a negative number when it is not known.

    Raises:
        ValueError, TypeError: as :func:`check_step`, and for a fraction of a run of unknown length.
    """
    check_step(value, argument)
    if isinstance(value, float) and not (math.isfinite(total) and total >= 0):
        raise ValueError(
            f"{argument}={value} is a fraction of a run whose length is not known; "
            f"set Trainer(max_steps=...), or give {argument} as an int number of optimizer steps"
        )
    return round(value * total) if isinstance(value, float) else value


def resolve_plan(start: int | float, freeze: int | float, total: int | float, *, exact: bool = True) -> PhasePlan:
    """Turn ``start`` and ``freeze`` into steps of a run of ``total`` optimizer steps.

    Args:
        start: int step, or float fraction of ``total``.
        freeze: likewise; a fraction above 0 is one step at least.
        total: length of the run; ``inf`` or a negative number when it is not known.
        exact: whether ``total`` is exact; phases beyond an estimate end with it instead of being refused.

    Raises:
        ValueError: if a fraction is asked of a run of unknown length, ``freeze`` lies beyond the run, or ``start``
            after ``freeze``.
    """
    first, last = (resolve_step(value, name, total) for name, value in (("start", start), ("freeze", freeze)))
    known = math.isfinite(total) and total >= 0
    if isinstance(freeze, float) and freeze > 0 and total >= 1:
        last = max(last, 1)  # at 0 weights are pruned before the first batch, without a look at their inputs
    if known and not exact:
        first, last = (min(step, math.floor(total)) for step in (first, last))
    if known and last > total:
        raise ValueError(
            f"freeze={freeze!r} is beyond the run, which has {int(total)} optimizer steps: the weights would never "
            f"become 2:4; lower freeze, or raise max_steps / max_epochs"
        )
    if first > last:
        raise ValueError(
            f"start={start!r} (step {first}) comes after freeze={freeze!r} (step {last}); swap or lower it"
        )
    return PhasePlan(int(first), int(last))
