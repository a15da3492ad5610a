"""What other callbacks remember as the best score so far begins anew when the model becomes 2:4.

A dense model scores better than the sparse one that it becomes. Its best score would stop the run (EarlyStopping),
keep every later checkpoint from being the best one (ModelCheckpoint) and lower the learning rate (ReduceLROnPlateau).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau


@dataclass(frozen=True)
class _Record:
    owner: str
    score: Tensor | float | None
    forget: Callable[[], None]

    @property
    def exists(self) -> bool:
        return self.score is not None and math.isfinite(float(self.score))


class BestRecords:
    """The best scores that the callbacks and learning rate schedulers of one trainer remember.

    Args:
        trainer: whose callbacks and schedulers they are.
        pl_module: may hold schedulers of its own.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._stale: dict[str, Tensor] = {}
        self._saved: dict[int, tuple[str, int]] = {}

    def restart(
        self,
        now: str = "the model is 2:4",
        before: str = "the dense model's",
        files: str = "; checkpoints from before the freeze stay on the disk and are not 2:4",
    ) -> None:
        """Forget every best score.

        Args:
            now: for the warning: what the scores from now on are of.
            before: whose score the best one was.
            files: what is to be known of the checkpoints so far.
        """
        self._stale = {name: value.detach().clone() for name, value in self._trainer.callback_metrics.items()}
        self._saved = {id(callback): _newest(callback) for callback in self._checkpoints()}
        records = [record for record in self._records() if record.exists]
        for record in records:
            record.forget()
        if records:
            rank_zero_warn(
                f"{now} from this step on: the best score of {', '.join(r.owner for r in records)} was {before} and "
                f"begins anew{files}"
            )

    def forget_stale(self) -> None:
        """Forget best scores that were taken since :meth:`restart` from metrics which the dense model had logged.

        A checkpoint within an epoch, for instance, is scored by the validation before it. Call when the first
        validation since starts.
        """
        stale, self._stale = self._stale, {}
        for record in self._records() if stale else ():
            if record.exists and any(float(record.score or 0.0) == float(value) for value in stale.values()):
                record.forget()

    def save_missing(self) -> None:
        """Write a checkpoint for every ModelCheckpoint whose last one stems from before the freeze.

        All ranks call it, at the end of the run.
        """
        trainer = self._trainer
        for callback in self._checkpoints() if not trainer.fast_dev_run else ():  # type: ignore[attr-defined]
            path, step = self._saved.get(id(callback), ("", 0))
            if not path or _newest(callback) != (path, step):
                continue
            metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
            path = callback.format_checkpoint_name(metrics, "{epoch}-{step}")
            callback.best_model_path, callback.best_model_score = path, None
            trainer.save_checkpoint(path, callback.save_weights_only)
            callback._last_checkpoint_saved, callback._last_global_step_saved = path, trainer.global_step
            rank_zero_warn(f"ModelCheckpoint has saved nothing since the freeze: the 2:4 model is saved as {path}")

    def _checkpoints(self) -> list[Any]:
        return [callback for callback in self._trainer.callbacks if _is_a(callback, "ModelCheckpoint")]  # type: ignore[attr-defined]

    def _records(self) -> Iterator[_Record]:
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if _is_a(callback, "EarlyStopping"):
                owner = f"EarlyStopping({callback.monitor!r})"
                yield _Record(owner, callback.best_score, partial(_restart_early_stopping, callback))
        for callback in self._checkpoints():
            if callback.monitor is not None:
                owner = f"ModelCheckpoint({callback.monitor!r})"
                yield _Record(owner, callback.best_model_score, partial(_restart_checkpoints, callback))
        for scheduler in self._plateaus():
            yield _Record("ReduceLROnPlateau", scheduler.best, scheduler._reset)

    def _plateaus(self) -> list[ReduceLROnPlateau]:
        """Return the schedulers of the trainer, those inside of them, and those that the module keeps itself."""
        waiting: list[Any] = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        for value in vars(self._pl_module).values():
            waiting += value if isinstance(value, (list, tuple)) else [value]
        found: dict[int, ReduceLROnPlateau] = {}
        for scheduler in waiting:
            if isinstance(scheduler, ReduceLROnPlateau):
                found[id(scheduler)] = scheduler
            inner = getattr(scheduler, "_schedulers", None)
            if isinstance(inner, (list, tuple)):
                waiting += inner  # the loop goes on over them
        return list(found.values())


def _is_a(callback: object, name: str) -> bool:
    """Return whether a class of that name is among the callback's: of lightning or of pytorch_lightning."""
    return any(cls.__name__ == name for cls in type(callback).__mro__)


def _newest(callback: Any) -> tuple[str, int]:
    """Return path and step of the newest checkpoint that the callback has written in this process."""
    return callback._last_checkpoint_saved, callback._last_global_step_saved


def _worst(mode: str) -> Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def _restart_early_stopping(callback: Any) -> None:
    callback.best_score, callback.wait_count = _worst(callback.mode), 0


def _restart_checkpoints(callback: Any) -> None:
    callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", _worst(callback.mode)
    callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
