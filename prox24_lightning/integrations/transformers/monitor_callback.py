"""The sparsity monitor in a ``transformers.Trainer``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from prox24_lightning.integrations.transformers.host import TransformersCallback
from prox24_lightning.integrations.transformers.scalars import log_scalars
from prox24_lightning.integrations.transformers.trainer_callback import Prox24TrainerCallback
from prox24_lightning.monitoring.figures import overview_figure, rendered
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.monitored_weights import MonitoredWeights, PruningState
from prox24_lightning.monitoring.output import MonitorOutput, write_png
from prox24_lightning.monitoring.summary import print_summary
from prox24_lightning.sparsify.zeros import ZerosWatch
from prox24_lightning.utils.files import save_object
from prox24_lightning.weights.selection import GroupedWeight, select_weights


class SparsityMonitorTrainerCallback(TransformersCallback):
    """:class:`~prox24_lightning.SparsityMonitor` for ``transformers.Trainer``: scalars, a figure, a closing table.

    It logs through the trainer, so it takes it: ``trainer.add_callback(SparsityMonitorTrainerCallback(trainer))``.
    The scalars go to the trainer's loggers and ``log_history``; the console shows phases and the closing table.
    It monitors the weights of every ``Prox24TrainerCallback`` of the trainer; without one, all weights that could be
    2:4, with one warning if they are 2:4 and nothing keeps them so. The history goes into the checkpoint folders. What
    fails in it is named in one warning, and the run continues.

    Logged under ``<name>/`` (``<name>/<name of the Prox24>/`` if there are several) are the values that
    :class:`~prox24_lightning.SparsityMonitor` lists. The overview figure is ``<output_dir>/<name>.png``.

    Args:
        trainer: whose ``log`` reports the scalars, to all of ``report_to``.
        every_n_steps: optimizer steps between two measurements; others follow the first step, the last step, each
            change of phase, and each pruning step.
        per_layer: log every layer too.
        overview: draw the overview figure, with the logged loss and ``metric_for_best_model`` (else ``eval_loss``).
        summary: print a table at the end.
        name: prefix of every tag, and name of the figure's file.

    Raises:
        ValueError: for ``every_n_steps`` below 1, and a name that is empty or holds ``/``.
    """

    in_lightning = "SparsityMonitor"

    def __init__(
        self,
        trainer: Trainer,
        every_n_steps: int = 50,
        *,
        per_layer: bool = False,
        overview: bool = True,
        summary: bool = True,
        name: str = "sparsity",
    ) -> None:
        super().__init__()
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps!r} must be a whole number from 1 up; to log nothing, remove the callback"
            )
        if not name or "/" in name:
            raise ValueError(f"name={name!r} is a prefix of tags and a file name; use letters, digits, '_' and '-'")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.overview = overview
        self.summary = summary
        self.name = name
        self._trainer = trainer
        self._output = MonitorOutput()
        self._monitored: list[MonitoredWeights] = []
        self._zeros: ZerosWatch | None = None
        self._begun = self._sought = False
        self._last = self._masks = 0
        self._loss = math.nan

    @property
    def histories(self) -> dict[str, SparsityHistory]:
        """The statistics so far, by name of the Prox24 (or ``"model"`` without one)."""
        return {entry.label: entry.history for entry in self._monitored}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._output, self._begun, self._loss = MonitorOutput(), False, math.nan
        self._zeros = None if self._pruning() else ZerosWatch(kwargs["model"])
        self._monitored, self._sought = [], False

    def _pruning(self) -> list[Prox24TrainerCallback]:
        callbacks = self._trainer.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, Prox24TrainerCallback)]

    def _find_weights(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Find what to measure once every callback has begun, whichever was added first."""
        self._sought = True
        saved: dict[str, Any] = {}
        with self._output.guarded("reading the history in the checkpoint"):
            if state.global_step and (file := self._file(args, state)).exists():
                saved = torch.load(file, weights_only=True)
        with self._output.guarded("finding the weights"):
            found: list[tuple[str, PruningState | None, tuple[GroupedWeight, ...]]]
            found = [(callback.config.name, callback.controller, callback.weights) for callback in self._pruning()]
            found = found or [("model", None, select_weights(model).chosen)]
            for label, controller, weights in found:
                history = SparsityHistory([weight.name for weight in weights])
                if label in saved and tuple(saved[label]["layers"]) == history.layers:
                    history = SparsityHistory.from_state_dict(saved[label])
                history.rewind(state.global_step)
                self._monitored.append(MonitoredWeights(label, controller, weights, history))

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._sought and state.is_world_process_zero:
            self._find_weights(args, state, kwargs["model"])
        for entry in self._monitored:
            if entry.pruning is not None:
                entry.pruning.measure_next_step(self._begun and self._is_due(state.global_step + 1))
        if self._monitored and not self._begun:
            self._begun, self._masks = True, self._count_masks()
            self._enter_phases(state)
            self._measure(state)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._zeros is not None:
            problem, self._zeros = self._zeros.problem(), None
            if problem is not None:
                warnings.warn(problem.replace("Prox24(", "Prox24TrainerCallback("), stacklevel=2)
        masks = self._count_masks()
        pruned, self._masks = masks != self._masks, masks
        if self._monitored and (self._enter_phases(state) or pruned or self._is_due(state.global_step)):
            self._measure(state)

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss = kwargs.get("logs", {}).get("loss", self._loss)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name = args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        for entry in self._monitored if self._begun else ():
            if (value := kwargs.get("metrics", {}).get(name)) is not None:
                entry.history.record_metric(state.global_step, name, float(value))

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._monitored:
            with self._output.guarded("writing the history"):
                save_object(self._file(args, state), {k: history.state_dict() for k, history in self.histories.items()})

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._begun:
            return
        self._measure(state)
        for entry in self._monitored:
            if self.overview and len(entry.history):
                with self._output.guarded("drawing the overview figure"):
                    stem = self.name if len(self._monitored) == 1 else f"{self.name}_{entry.label.replace('/', '_')}"
                    image = rendered(overview_figure(entry.history, entry.describe()))
                    write_png(Path(args.output_dir or ".") / f"{stem}.png", image)
            if self.summary and entry.layers:
                shapes = {weight.name: tuple(weight.parameter.shape) for weight in entry.weights}
                with self._output.guarded("printing the summary"):
                    print_summary(entry.layers, shapes, entry.describe())

    def _measure(self, state: TrainerState) -> None:
        self._last = state.global_step
        values: dict[str, float] = {}
        with self._output.guarded("measuring the weights"):
            loss, self._loss = self._loss, math.nan
            for entry in self._monitored:
                if entry.measure(state.global_step, loss):
                    prefix = f"{self.name}/{entry.label}/" if len(self._monitored) > 1 else f"{self.name}/"
                    values.update(entry.scalars(prefix, f"{self.name}_layers/" if self.per_layer else None))
        if values:
            with self._output.guarded("logging"):
                log_scalars(self._trainer, values, console=False)

    def _enter_phases(self, state: TrainerState) -> bool:
        entered = [entry.enters_phase(state.global_step) for entry in self._monitored]
        return any(entered)

    def _is_due(self, steps: int) -> bool:
        return steps // self.every_n_steps > self._last // self.every_n_steps

    def _count_masks(self) -> int:
        return sum(len(entry.pruning.masks) for entry in self._monitored if entry.pruning is not None)

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / f"{self.name}.pt"
