"""How many optimizer steps a Lightning run has: known beforehand, or learned from the steps that were taken."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden


class RunLength:
    """Estimate the real optimizer steps of a run, over all its optimizers.

    Automatic optimisation steps as Lightning says, unless the module overrides ``optimizer_step``: then as often as it
    has so far. Manual optimisation steps whenever the module likes: the steps a batch are measured, and until the first
    one it is taken to be one of every optimizer.

    Attributes:
        is_exact: whether the length is known beforehand.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._automatic = pl_module.automatic_optimization
        self.is_exact = self._automatic and not is_overridden("optimizer_step", pl_module)
        self.is_exact = self.is_exact and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._estimate = self._first_estimate()
        self._accumulation = trainer.accumulate_grad_batches
        self._step = 0  # real steps that were taken in ...
        self._counted = 0  # ... so many batches, or steps as Lightning counts them

    @property
    def total(self) -> float:
        """The steps of the whole run, as far as they are known by now."""
        if self.is_exact or not self._counted:
            return self._estimate
        if self._automatic:
            return self._estimate * self._step / self._counted
        return self._limited(self._step / self._counted * self._batches())

    def update(self, step: int) -> None:
        """Count at the start of a batch, when ``step`` real steps are done."""
        if self._automatic:
            self._follow_accumulation()
        if step != self._step:
            trainer = self._trainer
            self._step = step
            self._counted = trainer.global_step if self._automatic else trainer.fit_loop.total_batch_idx

    def is_last_batch(self) -> bool:
        """Return whether the run ends with the batch that is just done."""
        trainer = self._trainer
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            return True
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        return last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "counted": self._counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._counted = state["step"], state["counted"]

    def _first_estimate(self) -> float:
        trainer = self._trainer
        steps = trainer.estimated_stepping_batches  # loads the data, if need be
        if not self._automatic:
            return self._limited(self._batches() * len(trainer.optimizers))
        schedulers = [cb for cb in trainer.callbacks if isinstance(cb, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
        if not schedulers or not math.isfinite(self._batches()):
            return steps
        epochs = range(trainer.max_epochs or 0)
        batches = trainer.num_training_batches
        return self._limited(sum(math.ceil(batches / schedulers[-1].get_accumulate_grad_batches(e)) for e in epochs))

    def _follow_accumulation(self) -> None:
        """Count the steps that are left anew, if the module has set ``trainer.accumulate_grad_batches`` meanwhile."""
        trainer = self._trainer
        if trainer.accumulate_grad_batches == self._accumulation or not math.isfinite(self._batches()):
            return
        self._accumulation = trainer.accumulate_grad_batches
        if any(isinstance(cb, GradientAccumulationScheduler) for cb in trainer.callbacks):  # type: ignore[attr-defined]
            return  # known from the beginning
        batches, every = trainer.num_training_batches, self._accumulation
        rest = math.ceil((batches - trainer.fit_loop.batch_idx) / every)
        epochs = (trainer.max_epochs or 0) - trainer.current_epoch - 1
        self._estimate = self._limited(trainer.global_step + rest + epochs * math.ceil(batches / every))

    def _batches(self) -> float:
        epochs = self._trainer.max_epochs
        return math.inf if epochs in (None, -1) else float(self._trainer.num_training_batches * epochs)

    def _limited(self, steps: float) -> float:
        return steps if self._trainer.max_steps == -1 else min(steps, self._trainer.max_steps)
