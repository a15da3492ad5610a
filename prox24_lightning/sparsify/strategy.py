"""What the engine asks of a way to sparsify."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.groups import GroupedWeight
from prox24_lightning.sparsify.phases import PhasePlan

ScaleOf = Callable[[str], Tensor | None]
"""The scale of a weight's metric, by name; None for the weight's own coordinates."""

Frozen = dict[str, tuple[Tensor, Tensor]]
"""Weight name -> (mask, values), for the weights that shall be frozen now."""

DeviceOf = Callable[[str], torch.device]


class Strategy(ABC):
    """Turns dense weights into 2:4 ones between two steps of a run; the engine says when, and holds the masks.

    Attributes:
        strengths: the strength last used for each weight: 0-dim tensors by name.
        longest_pause: seconds of the longest pause that solving made between two steps of this process; 0 where nothing
            is solved.
        seconds: of all such pauses together.
    """

    def __init__(self) -> None:
        self.strengths: dict[str, Tensor] = {}
        self.longest_pause = 0.0
        self.seconds = 0.0

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
    def load_state_dict(self, state: dict[str, Any], device_of: DeviceOf) -> None:
        """Undo :meth:`state_dict`."""
