"""The interface between the engine, which decides when, and a strategy, which makes dense weights 2:4."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from prox24_lightning.mask import mask_24
from prox24_lightning.solvers.input_order.choose import ChosenOrder
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

ScaleOf = Callable[[str], Tensor | None]
"""Weight name -> scale of its metric; None for the weight's own coordinates."""

Masks = dict[str, Tensor]
"""Weight name -> mask (bool, True stays) of a weight that is frozen from now on."""


@dataclass(frozen=True)
class RunContext:
    """What a strategy works on from :meth:`Strategy.attach` until :meth:`Strategy.detach`.

    Attributes:
        weights: every weight that becomes 2:4, those that are frozen already included.
        plan: the steps at which the phases begin.
        scale_of: the scale of a weight's metric now in use.
        trained: the parameters that the optimizers train.
        leave_dense: takes weights out of the run, by name with the reason.
        move: brings inputs into other orders, with all that is kept beside the weights.
    """

    weights: tuple[GroupedWeight, ...]
    plan: PhasePlan
    scale_of: ScaleOf
    trained: frozenset[Tensor] = frozenset()
    leave_dense: Callable[[Mapping[str, str]], None] = lambda reasons: None
    move: Callable[[Sequence[ChosenOrder]], None] = lambda chosen: None


@dataclass(frozen=True)
class OptimizerStep:
    """An optimizer step that has just been taken in the sparsify phase.

    Attributes:
        number: finished optimizer steps, this one included.
        weights: the weights that it changed and that are not frozen.
        statistics: collects statistics from the pass that changes the weights; None where nobody asks for them.
    """

    number: int
    weights: Sequence[GroupedWeight]
    statistics: PassStatistics | None = None


def projected_mask(weight: GroupedWeight, scale: Tensor | None) -> Tensor:
    """Return the mask of the two largest of every four entries of a weight, in the metric.

    Raises:
        ValueError: with the weight's name, if it holds NaN.
    """
    try:
        return mask_24(local_part(weight.parameter), dim=weight.dim, scale=scale)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from error


class Strategy(ABC):
    """Make dense weights 2:4 between the steps of a run.

    A strategy writes new values into the weights and returns masks; the engine enforces the masks from then on. Of a
    sharded weight every rank changes its own part: scales and masks are those of this part. All ranks call every
    method, in the same order.

    Attributes:
        context: what the strategy works on; empty until :meth:`attach`.
        strengths: the strength last used for each weight, 0-dim tensors by name, units 1 / (weight * scale).
        solve_seconds: time that solving layers has taken in this process; 0 where nothing is solved.
        longest_pause: the longest pause that solving made between two steps, in seconds.
    """

    def __init__(self) -> None:
        self.context = RunContext((), PhasePlan(0, 0), lambda name: None)
        self.strengths: dict[str, Tensor] = {}
        self.solve_seconds = 0.0
        self.longest_pause = 0.0

    def scaled_weights(self, weights: Sequence[GroupedWeight]) -> Sequence[GroupedWeight]:
        """Return those of ``weights`` that need the scale of the activation metric."""
        return weights

    def attach(self, context: RunContext) -> None:
        """Register hooks: training begins, or goes on with other weights or optimizers."""
        self.context = context

    def change_plan(self, plan: PhasePlan) -> None:
        """Go on with other steps for the phases: the length of the run has become better known."""
        self.context = replace(self.context, plan=plan)

    def detach(self) -> None:  # noqa: B027
        """Remove every hook."""

    def before_batch(self, step: int) -> None:  # noqa: B027
        """Prepare for a batch that leads to optimizer step ``step``."""

    def after_batch(self) -> None:  # noqa: B027
        """The batch has ended: what the model is called with now is no training."""

    @abstractmethod
    def begin(self) -> None:
        """Begin the sparsify phase; no weight has been changed yet."""

    @abstractmethod
    def after_step(self, step: OptimizerStep) -> Masks:
        """Change weights after an optimizer step of the sparsify phase.

        Returns:
            masks of the weights that are frozen from now on.
        """

    def before_finish(self) -> None:  # noqa: B027
        """Prepare for :meth:`finish`; what changes weights here moves copies of them itself."""

    @abstractmethod
    def finish(self, weights: Sequence[GroupedWeight]) -> Masks:
        """End the sparsify phase: make ``weights``, all that are not frozen yet, 2:4 and return their masks."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        """Undo :meth:`state_dict`."""
