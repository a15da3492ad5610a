"""The callback that logs how a model becomes 2:4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.callbacks.unenforced_zeros import UnenforcedZeros
from prox24_lightning.monitoring.figures import mask_figure, overview_figure, rendered
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.monitored_weights import MonitoredWeights
from prox24_lightning.monitoring.output import MonitorOutput, tensorboard_loggers
from prox24_lightning.monitoring.summary import print_next, print_summary
from prox24_lightning.monitoring.training_loss import TrainingLoss
from prox24_lightning.sparsify.controller import SparsifyController
from prox24_lightning.weights.selection import GroupedWeight, select_weights
from prox24_lightning.weights.sharded import is_sharded


class SparsityMonitor(Callback):
    """Log how sparse the weights are, for the whole model and layer by layer.

    It monitors the weights of every :class:`~prox24_lightning.callbacks.prox24.Prox24` of the trainer; without one, all
    weights that could be 2:4. It never changes a weight. The statistics are computed on the device and read in one
    transfer; between two measurements nothing is computed. Of sharded weights all ranks measure their parts; histograms
    and mask pictures show the first rank's. Any logger works, and none: figures, histograms and text
    need ``TensorBoardLogger``. The overview figure is also written beside the log, as ``<name>.png``. It shows the
    training loss, and what ``ModelCheckpoint`` or ``EarlyStopping`` monitors where validation logs it. A logger that
    fails is named in one warning, and the run continues.

    Logged under ``<name>/`` (``<name>/<name of the Prox24>/`` if there are several), with Lightning's own x-axis:
    ``groups_24`` share of 2:4 groups, ``groups_with_0_zeros`` to ``groups_with_4_zeros``, ``retained_squared_norm``,
    ``penalty``, ``rms``, ``mask_flips``, ``strength``
    (see :class:`~prox24_lightning.monitoring.statistics.SparsityStats`),
    ``phase`` (0 dense, 1 sparsify, 2 frozen) and ``step`` (real optimizer steps, as Prox24 counts them); for each layer
    under ``<name>_layers/<weight>/``.

    Args:
        every_n_steps: optimizer steps between two measurements; others follow the first step, the last step, each
            change of phase, and each pruning step.
        histograms_every_n_steps: least number of steps between two histograms of every weight; 0 for none.
        figures_every_n_steps: least number of steps between two overview figures and mask pictures; 0 for one
            overview at the end only. Drawing takes about a second.
        per_layer: log every layer too.
        picture_layers: how many weights the mask picture shows, evenly spread over the model; 0 for none.
        overview: draw the overview figure at the end.
        metric: name of the validation metric in the overview figure; None: what ``ModelCheckpoint`` or
            ``EarlyStopping`` monitors.
        progress_bar: show the share of 2:4 groups as ``2:4``.
        summary: print a table at the end.
        targets: patterns of weights to monitor; used without a Prox24 only.
        skip: patterns of weights to leave out; used without a Prox24 only.
        name: prefix of every tag and name of the figure's file; tells several monitors apart.

    Raises:
        ValueError: for a rate out of its range, and a name that is empty or holds ``/``.
        MisconfigurationException: at the start of a fit without Prox24, for ``targets`` or ``skip`` that do not fit.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        histograms_every_n_steps: int = 500,
        figures_every_n_steps: int = 500,
        per_layer: bool = True,
        picture_layers: int = 3,
        overview: bool = True,
        metric: str | None = None,
        progress_bar: bool = True,
        summary: bool = True,
        targets: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        name: str = "sparsity",
    ) -> None:
        super().__init__()
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps!r} must be a whole number from 1 up; to log nothing, remove the callback"
            )
        for argument, value in (
            ("histograms_every_n_steps", histograms_every_n_steps),
            ("figures_every_n_steps", figures_every_n_steps),
            ("picture_layers", picture_layers),
        ):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{argument}={value!r} must be a whole number from 0 up; 0 switches it off")
        if not name or "/" in name:
            raise ValueError(f"name={name!r} is a prefix of tags and a file name; use letters, digits, '_' and '-'")
        self.every_n_steps = every_n_steps
        self.histograms_every_n_steps = histograms_every_n_steps
        self.figures_every_n_steps = figures_every_n_steps
        self.per_layer = per_layer
        self.picture_layers = picture_layers
        self.overview = overview
        self.metric = metric
        self.progress_bar = progress_bar
        self.summary = summary
        self.targets = targets
        self.skip = skip
        self.name = name
        self._output = MonitorOutput()
        self._loss = TrainingLoss()
        self._zeros = UnenforcedZeros()
        self._monitored: list[MonitoredWeights] = []
        self._loaded: dict[str, Any] = {}
        self._begun = False
        self._ended = False
        self._last: dict[str, int] = {}
        self._masks = 0
        self._seen_optimizer_steps: tuple[int, ...] = ()

    @property
    def histories(self) -> dict[str, SparsityHistory]:
        """The statistics so far, by name of the Prox24 (or ``"model"`` without one)."""
        return {entry.label: entry.history for entry in self._monitored}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begun = False  # until the first batch, the statistics belong to an earlier run

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._zeros.on_train_start(trainer, pl_module)
        self._output, self._loss = MonitorOutput(), TrainingLoss()
        records = self._loaded
        if not records and self._finished_steps(trainer):  # at step 0 the statistics of an earlier run do not apply
            records = {label: history.state_dict() for label, history in self.histories.items()}
        self._loaded = {}
        self._monitored = []
        found = self._find_weights(trainer, pl_module)
        sharded = any(is_sharded(weight.parameter) for _, _, weights in found for weight in weights)
        if not trainer.is_global_zero and not sharded:
            return
        for label, controller, weights in found:
            history = SparsityHistory([weight.name for weight in weights])
            with self._output.guarded("reading the history in the checkpoint"):
                if label in records and tuple(records[label]["layers"]) == history.layers:
                    history = SparsityHistory.from_state_dict(records[label])
            history.rewind(self._finished_steps(trainer))
            self._monitored.append(MonitoredWeights(label, controller, weights, history))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Only now have all callbacks restored their states, whatever their order.
        steps = self._finished_steps(trainer)
        for entry in self._monitored:
            if entry.pruning is not None:
                entry.pruning.measure_next_step(self._begun and self._due("statistics", self.every_n_steps, steps + 1))
        if self._monitored and not self._begun:
            self._begun, self._masks = True, self._count_masks()
            self._last = {"statistics": steps, "histograms": steps, "figures": steps}
            self._phase_begins(trainer, steps)
            self._measure(trainer, steps)
            if self.histograms_every_n_steps and steps == 0:
                self._histograms(trainer, steps)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._zeros.on_train_batch_end(trainer)
        if not self._monitored:
            return
        # Lightning has divided the loss of automatic optimization by the batches that accumulate.
        self._loss.add(outputs, trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        steps = self._finished_steps(trainer) + 1  # Lightning adds this one after the hook
        masks = self._count_masks()
        pruned, self._masks = masks != self._masks, masks
        if not self._phase_begins(trainer, steps) and not pruned:
            if not self._due("statistics", self.every_n_steps, steps):
                return
            count = self._optimizer_steps(trainer)
            if count == self._seen_optimizer_steps and any(count):
                return  # a manual loop that accumulates by itself: wait until it steps again
        self._measure(trainer, steps)
        if self._due("histograms", self.histograms_every_n_steps, steps):
            self._histograms(trainer, steps)
        if self._due("figures", self.figures_every_n_steps, steps):
            self._figures(trainer, steps)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begun or trainer.sanity_checking:
            return
        logged = trainer.callback_metrics
        name = next((name for name in self._monitored_metrics(trainer) if name in logged), None)
        if name is not None:
            # As in on_train_batch_end, Lightning adds this step after the hook.
            steps = self._finished_steps(trainer) + (not trainer.fit_loop.epoch_loop._should_accumulate())
            for entry in self._monitored:
                entry.history.record_metric(steps, name, float(logged[name]))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitored and self._begun:
            steps = self._finished_steps(trainer)
            self._measure(trainer, steps)
            if self.overview:
                self._figures(trainer, steps)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The progress bar has left the terminal by now.
        for entry in self._monitored:
            if self.summary and self._begun and entry.layers and trainer.is_global_zero:
                shapes = {weight.name: tuple(weight.parameter.shape) for weight in entry.weights}
                with self._output.guarded("printing the summary"):
                    print_summary(entry.layers, shapes, entry.describe())
                self._ended = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # After the tables that other callbacks print at the end of the fit.
        if self._ended and (checkpoint := _last_checkpoint(trainer)):
            print_next(checkpoint)
        self._ended = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The device may be lost; the statistics read so far are not.
        for entry in self._monitored:
            if self.overview and self._begun and trainer.is_global_zero:
                self._overview(trainer, entry)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._loaded or {label: history.state_dict() for label, history in self.histories.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _monitored_metrics(self, trainer: Trainer) -> list[str]:
        """Return the names of the metrics that the overview figure may show, the first choice first."""
        if self.metric is not None:
            return [self.metric]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [name for callback in callbacks if isinstance(name := getattr(callback, "monitor", None), str)]

    def _find_weights(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[tuple[str, SparsifyController | None, tuple[GroupedWeight, ...]]]:
        """Return label, controller and weights of everything that is monitored."""
        callbacks = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Prox24) and callback.weights
        ]
        if callbacks:
            return [(callback.name, callback.controller, callback.weights) for callback in callbacks]
        try:
            weights = select_weights(pl_module, targets=self.targets, skip=self.skip).chosen
        except ValueError as error:
            if self.targets is not None or self.skip is not None:
                raise MisconfigurationException(f"SparsityMonitor: {error}") from error
            rank_zero_warn(f"SparsityMonitor has nothing to measure: {error}")
            return []
        if not weights:
            rank_zero_warn("SparsityMonitor has nothing to measure: no weight of the model can be 2:4")
            return []
        return [("model", None, weights)]

    def _measure(self, trainer: Trainer, steps: int) -> None:
        self._last["statistics"] = steps
        self._seen_optimizer_steps = self._optimizer_steps(trainer)
        metrics: dict[str, float] = {}
        groups = sparse = 0.0
        with self._output.guarded("measuring the weights"):
            loss = self._loss.take()
            for entry in self._monitored:
                if entry.measure(steps, loss):
                    layers = f"{self.name}_layers/" if self.per_layer else None
                    metrics.update(entry.scalars(self._prefix(entry), layers))
                for layer in entry.layers.values():
                    groups += layer.groups
                    sparse += layer.groups * layer.groups_24
            if self.progress_bar:
                # The dict behind the bar keeps a value until it is replaced. A plain number needs no transfer from the
                # device at each refresh, unlike a value given to LightningModule.log.
                trainer.progress_bar_metrics["2:4"] = round(sparse / groups, 3)
        if trainer.is_global_zero:
            self._output.metrics(trainer, metrics, steps)

    def _histograms(self, trainer: Trainer, steps: int) -> None:
        self._last["histograms"] = steps
        if not trainer.is_global_zero:
            return
        weights = [weight for entry in self._monitored for weight in entry.weights]
        self._output.histograms(trainer, f"{self.name}_weights/", weights, steps)

    def _figures(self, trainer: Trainer, steps: int) -> None:
        self._last["figures"] = steps
        if not trainer.is_global_zero:
            return
        for entry in self._monitored:
            self._overview(trainer, entry)
            if self.picture_layers and tensorboard_loggers(trainer):
                with self._output.guarded("drawing the mask picture"):
                    title = f"masks after {steps} steps: corners of the weights"
                    image = rendered(mask_figure(entry.mask_pictures(self.picture_layers), title))
                    self._output.image(trainer, f"{self._prefix(entry)}masks", image, steps)

    def _overview(self, trainer: Trainer, entry: MonitoredWeights) -> None:
        with self._output.guarded("drawing the overview figure"):
            if len(entry.history) and self._output.wants_images(trainer):
                image = rendered(overview_figure(entry.history, entry.describe()))
                # The name of a Prox24 may hold a path within the model.
                stem = self.name if len(self._monitored) == 1 else f"{self.name}_{entry.label.replace('/', '_')}"
                self._output.png(trainer, stem, image)
                self._output.image(trainer, f"{self._prefix(entry)}overview", image, entry.history.steps[-1])

    def _phase_begins(self, trainer: Trainer, steps: int) -> bool:
        """Report the phases that have begun since the last batch; return whether there are any."""
        begins = [entry for entry in self._monitored if entry.enters_phase(steps)]
        for entry in begins:
            text = f"{entry.label}: phase {entry.history.phases[-1][1]} after step {steps}"
            if trainer.is_global_zero:
                self._output.text(trainer, f"{self._prefix(entry)}phase_changes", text, steps)
        return bool(begins)

    def _prefix(self, entry: MonitoredWeights) -> str:
        return f"{self.name}/{entry.label}/" if len(self._monitored) > 1 else f"{self.name}/"

    def _due(self, what: str, every: int, steps: int) -> bool:
        """Return whether a multiple of ``every`` lies between the step of the last ``what`` and ``steps``."""
        return every > 0 and steps // every > self._last[what] // every

    def _count_masks(self) -> int:
        return sum(len(entry.pruning.masks) for entry in self._monitored if entry.pruning is not None)

    def _optimizer_steps(self, trainer: Trainer) -> tuple[int, ...]:
        """Return every count of optimizer steps; all are zero in a manual loop over bare optimizers."""
        return (
            trainer.global_step,
            *(entry.pruning.step for entry in self._monitored if entry.pruning is not None),
        )

    @staticmethod
    def _finished_steps(trainer: Trainer) -> int:
        """Return the number of batches that led to a step, which is the x-axis of all that Lightning logs."""
        return trainer.fit_loop.epoch_loop._batches_that_stepped


def _last_checkpoint(trainer: Trainer) -> str:
    """Return the newest file of the first ModelCheckpoint; "" if there is none."""
    checkpoint: Any = trainer.checkpoint_callback
    return getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
