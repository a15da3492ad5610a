"""Settings of distillation, as the callbacks of every training framework take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from prox24_lightning.finetune.distillation.teacher_comparison import OutputLoss


@dataclass(frozen=True)
class DistillationConfig:
    """The arguments of :class:`~prox24_lightning.Distillation`, which documents them.

    Raises:
        ValueError: for a wrong value, with the value and the remedy.
    """

    share: float = 0.5
    temperature: float = 1.0
    features: float = 0.0
    loss: OutputLoss = "kl"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share={self.share!r} must be above 0 and at most 1: it is the weight of the distillation loss"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature!r} must be above 0; 1 leaves the distributions as they are"
            )
        if not self.features >= 0:
            raise ValueError(f"features={self.features!r} must not be negative; 0 leaves hidden states alone")
        if self.loss not in get_args(OutputLoss):
            raise ValueError(f"loss={self.loss!r} is unknown; use one of {', '.join(get_args(OutputLoss))}")
        if self.loss == "mse" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature!r} belongs to loss='kl'; set that, or leave temperature out"
            )
