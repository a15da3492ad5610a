"""What the engine asks of a way to sparsify."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prox24_lightning.mask import mask_24
from prox24_lightning.prox.statistics import Look
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

ScaleOf = Callable[[str], Tensor | None]
"""The scale of a weight's metric, by name; None for the weight's own coordinates."""

Frozen = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> (mask, values), for the weights that shall be frozen now."""


@dataclass(frozen=True)
class StepLook:
    """A look at a weight from the pass that changed it; out of date once something else has written to the weight."""

    look: Look
    scale: Tensor | None
    version: int

    def is_of(self, values: Tensor, scale: Tensor | None) -> bool:
        """Whether it still says what ``values`` are, in the metric of ``scale``."""
        return self.version == values._version and self.scale is scale


def projected(weight: GroupedWeight, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask and values of a weight as it stands: the two largest of every four, in the metric.

    Raises:
        ValueError: with the weight's name, if it holds NaN.
    """
    values = local_part(weight.parameter)
    try:
        return mask_24(values, dim=weight.dim, scale=scale), values
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from error


class Strategy(ABC):
    """Turns dense weights into 2:4 ones between two steps of a run; the engine says when, and holds the masks.

    Of a sharded weight every rank changes its own part: scales, masks and values are those of this part. All ranks call
    every method, in the same order.

    Attributes:
        strengths: the strength last used for each weight: 0-dim tensors by name.
        longest_pause: seconds of the longest pause that solving made between two steps of this process; 0 where nothing
            is solved.
        seconds: of all such pauses together.
        looking: whether the next :meth:`after_step` shall look at the weights in the pass that changes them.
        looks: what it has seen, by name; of weights that it changes in another way it says nothing.
        trained: the parameters that training changes: those of its optimizers.
    """

    def __init__(self) -> None:
        self.strengths: dict[str, Tensor] = {}
        self.longest_pause = 0.0
        self.seconds = 0.0
        self.looking = False
        self.looks: dict[str, StepLook] = {}
        self.trained: frozenset[Tensor] = frozenset()

    def scaled_weights(self, weights: Sequence[GroupedWeight]) -> Sequence[GroupedWeight]:
        """Those of ``weights`` for which the strategy asks for the scale of the activation metric."""
        return weights

    def attach(self, weights: Sequence[GroupedWeight], plan: PhasePlan) -> None:  # noqa: B027
        """Training (again) begins with these weights: register hooks."""

    def detach(self) -> None:  # noqa: B027
        """Remove every hook."""

    def before_batch(self, step: int) -> None:  # noqa: B027
        """A batch begins that leads to optimizer step ``step``."""

    @abstractmethod
    def begin(self, weights: Sequence[GroupedWeight], scale_of: ScaleOf) -> None:
        """The sparsify phase begins; nothing has been changed yet."""

    @abstractmethod
    def after_step(self, step: int, weights: Sequence[GroupedWeight], scale_of: ScaleOf) -> Frozen:
        """Optimizer step ``step`` is done; ``weights`` are those that it changed and that are not frozen.

        Returns:
            what shall be frozen now.
        """

    @abstractmethod
    def finish(self, weights: Sequence[GroupedWeight], scale_of: ScaleOf) -> Frozen:
        """The phase ends: masks and values of ``weights``, all that are still unfrozen."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        """Undo :meth:`state_dict`."""
