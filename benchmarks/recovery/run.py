"""One run: a row, a seed and a learning rate, through Lightning's Trainer."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from typing_extensions import override

from benchmarks.peers import OneShot
from benchmarks.recovery.averages import Averages
from benchmarks.recovery.rows import Row
from benchmarks.recovery.task import Task
from prox24_lightning import Prox24
from prox24_lightning.cli.compare.training_record import TrainingRecord
from prox24_lightning.finetune import find_student
from prox24_lightning.mask import violations_24
from prox24_lightning.weights.selection import select_weights

_WARM_UP = 5
_POINTS = 50


class StepTimes(Callback):
    """Wall time between the ends of two batches, the first few left out: they compile and warm up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = time.perf_counter()
        if self._last is not None and trainer.global_step > _WARM_UP:
            self.seconds.append(now - self._last)
        self._last = now


class LossCurve(Callback):
    """The loss that each training step minimised."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self._losses.append(outputs["loss"].detach())

    def points(self, count: int = _POINTS) -> list[float]:
        """Its means over ``count`` parts of the run, as far as there are so many steps."""
        losses = torch.stack(self._losses).float()
        return [round(float(part.mean()), 5) for part in losses.tensor_split(min(count, len(losses)))]


def execute(task: Task, row: Row, seed: int, lr: float | None) -> dict[str, Any]:
    """Train and score; what the run found, as plain types."""
    row = task.adapted(row)
    teacher, teacher_seconds = fine_tuned_teacher(task, row, seed)
    seed_everything(seed, workers=True, verbose=False)
    module = task.module(lr, row.module)
    data = task.data(seed)
    record, times, curve = TrainingRecord(), StepTimes(), LossCurve()
    callbacks = row.callbacks(task.calibration(data) if row.prune is not None else (), teacher)
    trainer = trainer_of(task, [*callbacks, record, times, curve])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    # Constructors may have drawn random numbers; from here on every row draws the same ones.
    seed_everything(seed, workers=True, verbose=False)
    trainer.fit(module, datamodule=data)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    steps = trainer.global_step
    score = trainer.test if task.split == "test" else trainer.validate

    def scored() -> dict[str, Any]:
        parts = score(module, datamodule=data, verbose=False)
        scores = {name: float(value) for logged in parts for name, value in logged.items()}
        return {"losses": task.losses(scores), "scores": scores}

    last = scored()
    kept = [callback for callback in callbacks if isinstance(callback, Averages)]
    averages = {name: scored() for averages in kept for name in averages.put_in_turn(module)}
    task.finished(module)
    return {
        **last,
        "steps": steps,
        "seconds": record.seconds,
        **({"teacher_seconds": teacher_seconds} if teacher is not None else {}),
        "pruning_seconds": sum(callback.seconds for callback in callbacks if isinstance(callback, OneShot)),
        "step_ms": 1e3 * statistics.median(times.seconds) if times.seconds else None,
        "longest_step_ms": 1e3 * max(times.seconds) if times.seconds else None,
        "peak_gib": peak,
        "share_24": _share_24(module),
        "calibration": _calibration(callbacks),
        "batches": record.checksum,
        "train_losses": curve.points(),
        "early_rise": _early_rise(callbacks),
        **({"averages": averages} if averages else {}),
    }


def trainer_of(task: Task, callbacks: list[Callback]) -> Trainer:
    """The Trainer of one run."""
    return Trainer(
        max_steps=task.steps,
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=task.steps + 1,
        **task.trainer(),
    )


def fine_tuned_teacher(task: Task, row: Row, seed: int) -> tuple[nn.Module | None, float]:
    """The dense model after the same steps on the same batches, and the seconds of that; None if the row needs none."""
    if (settings := row.teacher.get("fine_tuned")) is None:
        return None, 0.0
    more = {name: value for name, value in settings.items() if name != "lr"}
    seed_everything(seed, workers=True, verbose=False)
    module, record = task.module(settings["lr"], more), TrainingRecord()
    trainer_of(task, [record]).fit(module, datamodule=task.data(seed))
    _, network = find_student(module)
    return network, record.seconds


def free_memory() -> None:
    """Give the last run's memory back, so that runs beside this one can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _calibration(callbacks: Sequence[Callback]) -> str | None:
    """How Prox24 got the inputs of its layers: "rerun", "stream" or "magnitude"; None where it needs none."""
    states = [callback.state_dict() for callback in callbacks if isinstance(callback, Prox24)]
    return next((way for state in states if (way := state.get("strategy", {}).get("way"))), None)


def _early_rise(callbacks: Sequence[Callback]) -> dict[str, Any] | None:
    """What Prox24 has found about the learning rate before anything was pruned; None where it looks for nothing."""
    rises = [callback.early_rise for callback in callbacks if isinstance(callback, Prox24)]
    return next(({**asdict(rise), "warns": rise.is_too_high} for rise in rises if rise is not None), None)


@torch.no_grad()
def _share_24(module: LightningModule) -> float:
    """Share of the groups of four, of the weights that Prox24 would take, that are 2:4."""
    checks = [violations_24(weight.parameter, dim=weight.dim) for weight in select_weights(module)]
    groups = sum(check.groups for check in checks)
    return 1 - sum(check.count for check in checks) / groups
