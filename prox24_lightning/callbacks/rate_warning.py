"""A warning when losses show that the learning rate is too high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from prox24_lightning.calibration.calls.eager_code import inside_compiled
from prox24_lightning.finetune.distillation.student import find_student
from prox24_lightning.monitoring.early_rise import EarlyRise, EarlyWatch
from prox24_lightning.monitoring.loss_rise import RateWatch
from prox24_lightning.monitoring.loss_since_start import LossSinceStart
from prox24_lightning.monitoring.training_loss import loss_of
from prox24_lightning.sparsify.controller import SparsifyController
from prox24_lightning.weights.sharded import is_sharded


class RateWarning:
    """Watch the loss of a fit on rank zero, and warn of a rise that only the learning rate explains.

    Before anything is pruned, the loss on new batches is compared with that of the model before the run; after the
    freeze, the training loss with its own lowest value. Gives no warning under manual optimisation, with several
    optimizers, and beside modules and callbacks that change the loss or the model's outputs along the run
    (``changes_loss``).

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
        self.early_rise: EarlyRise | None = None
        parts = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
        knows = pl_module.automatic_optimization and len(trainer.optimizers) == 1
        knows = knows and not any(getattr(part, "changes_loss", False) for part in parts)
        self._trainer = trainer
        self._controllers = controllers
        self._watch: RateWatch | None = None
        self._early: EarlyWatch | None = None
        if knows and trainer.is_global_zero and controllers[0].step == 0:
            dense_until = min(controller.dense_until for controller in controllers)
            self._early = EarlyWatch(partial(_comparison, trainer, pl_module), steps, dense_until)
        if knows and trainer.is_global_zero:
            self._watch = RateWatch(steps, trainer.accumulate_grad_batches, controllers[0].step)

    def before_batch(self, batch: Any) -> None:
        """A batch begins."""
        if self._early is not None:
            self._early.begin_batch(self._controllers[0].step, batch)

    def after_batch(self, outputs: Any) -> None:
        """Take the loss of the batch that has ended."""
        if self._early is None and self._watch is None:
            return
        # Lightning has divided the loss by the batches that accumulate.
        factor = float(self._trainer.accumulate_grad_batches)
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        if self._early is not None:
            self._compare(outputs, factor, groups)
        if self._watch is None:
            return
        phases = {controller.phase for controller in self._controllers}
        phase = phases.pop() if len(phases) == 1 else "sparsify"
        risen = self._watch.add(outputs, self._controllers[0].step, phase, groups, factor)
        if risen is not None:
            rank_zero_warn(f"{self._controllers[0].config.name}: {risen}")

    def close(self) -> None:
        """Remove the hooks of a comparison that has not ended."""
        if self._early is not None:
            self._early.close()

    def _compare(self, outputs: Any, factor: float, groups: list[dict[str, Any]]) -> None:
        assert self._early is not None
        loss, step = loss_of(outputs), self._controllers[0].step
        minimised = torch.tensor(math.nan) if loss is None or is_sharded(loss) else factor * loss.detach().reshape(())
        is_dense = not any(controller.masks for controller in self._controllers)
        rise = self._early.end_batch(step, is_dense, groups, minimised)
        self._early = None if self._early.has_ended else self._early
        if rise is None:
            return
        self.early_rise = rise
        config = self._controllers[0].config
        if rise.is_too_high:
            rank_zero_warn(f"{config.name}: {rise}: {rise.advice}")
        elif config.verbose:
            rank_zero_info(f"{config.name}: {rise}")


def _comparison(trainer: Trainer, pl_module: LightningModule) -> LossSinceStart:
    _, network = find_student(pl_module)
    if network in inside_compiled(pl_module):
        raise ValueError("compiled code calls the model")
    return LossSinceStart(network, pl_module, shared=(trainer, pl_module))
