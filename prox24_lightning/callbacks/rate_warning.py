"""A warning when the training loss shows that the learning rate is too high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from prox24_lightning.monitoring.loss_rise import RateWatch
from prox24_lightning.sparsify.controller import SparsifyController


class RateWarning:
    """Watch the loss of a fit on rank zero, and warn of a rise that only the learning rate explains.

    Gives no warning under manual optimisation, with several optimizers, and beside modules and callbacks that change
    the loss or the model's outputs along the run (``changes_loss``).

    Args:
        trainer: runs the fit.
        pl_module: is trained.
        controllers: of all Prox24 callbacks: while one of them still prunes, the loss may rise.
        steps: length of the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        controllers: Sequence[SparsifyController],
        steps: float,
    ) -> None:
        parts = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        knows = pl_module.automatic_optimization and len(trainer.optimizers) == 1
        knows = knows and not any(getattr(part, "changes_loss", False) for part in parts)
        self._trainer = trainer
        self._controllers = controllers
        self._watch: RateWatch | None = None
        if knows and trainer.is_global_zero:
            self._watch = RateWatch(steps, trainer.accumulate_grad_batches, controllers[0].step)

    def after_batch(self, outputs: Any) -> None:
        """Take the loss of the batch that has ended."""
        if self._watch is None:
            return
        phases = {controller.phase for controller in self._controllers}
        phase = phases.pop() if len(phases) == 1 else "sparsify"
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        # Lightning has divided the loss by the batches that accumulate.
        factor = float(self._trainer.accumulate_grad_batches)
        risen = self._watch.add(outputs, self._controllers[0].step, phase, groups, factor)
        if risen is not None:
            rank_zero_warn(f"{self._controllers[0].config.name}: {risen}")
