"""Stop a run early that only tries a learning rate, and judge it by its training loss until then."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from prox24_lightning.monitoring.training_loss import TrainingLoss


class EarlySearch(Callback):
    """Stop after ``part`` of the run; ``loss`` is the mean training loss over the second half of that.

    Schedules of the learning rate and of pruning are those of the whole run. At this time the rate is near its peak,
    and the loss tells a rate that is too high from one that suits; at the end of a run the highest rate has the lowest
    training loss, whatever the loss on other text.

    Args:
        part: of the run's optimizer steps, above 0 and below 1.

    Raises:
        ValueError: for another part.
    """

    def __init__(self, part: float) -> None:
        if not 0 < part < 1:
            raise ValueError(
                f"search_part={part} must lie between 0 and 1: a search run ends after this part of the run"
            )
        self.part = part
        self.loss = math.nan
        self._last = 0
        self._losses = TrainingLoss()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("search_part is a part of a run whose length is not known; set trainer.max_steps")
        self._last = max(1, round(self.part * steps))
        # Lightning does not stop before them.
        trainer.fit_loop.min_epochs = None
        trainer.fit_loop.epoch_loop.min_steps = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._last // 2:
            self._losses.add(outputs, trainer.accumulate_grad_batches)
        if trainer.global_step >= self._last:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loss = self._losses.take()
