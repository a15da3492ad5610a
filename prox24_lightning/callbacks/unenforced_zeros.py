"""Warn, once, of a run that trains a 2:4 model without anything that keeps it so."""

from __future__ import annotations

import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.sparsify.zeros import ZerosWatch


class UnenforcedZeros:
    """For callbacks that work with and without a Prox24; all ranks call both methods."""

    def __init__(self) -> None:
        self._watch: ZerosWatch | None = None
        self._begin = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look which weights are 2:4, if the trainer has no Prox24."""
        alone = not any(isinstance(callback, Prox24) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        self._watch, self._begin = ZerosWatch(pl_module) if alone else None, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Look again after the first optimizer step, and warn."""
        if self._watch is None or trainer.global_step == self._begin:
            return
        problem, self._watch = self._watch.problem(), None
        if problem is not None:
            _warn(problem)


@rank_zero_only
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)  # always from here: several callbacks say it once
