"""The callback that shows how a model becomes 2:4: where, how fast, and at what price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.monitoring.figures import mask_figure, overview_figure, rendered
from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.output import MonitorOutput, tensorboard_loggers
from prox24_lightning.monitoring.summary import print_summary
from prox24_lightning.monitoring.track import Track
from prox24_lightning.weights.selection import GroupedWeight, select_weights


class SparsityMonitor(Callback):
    """Log how sparse the weights are, whole model and layer by layer; it looks and changes nothing.

    It watches the weights of every :class:`~prox24_lightning.callbacks.prox24.Prox24` of the trainer; without one, all
    weights that could be 2:4. Everything is measured on the device and read in one go at each look; between looks
    it does nothing. Any logger works, and none: figures, histograms and text need ``TensorBoardLogger``. The overview
    figure is also written beside the log, as ``<name>.png``. A logger that fails is reported once and the run goes on.

    Logged under ``<name>/`` (``<name>/<name of the Prox24>/`` if there are several), with Lightning's own x-axis:
    ``groups_24`` share of 2:4 groups, ``groups_with_0_zeros`` to ``groups_with_4_zeros``, ``energy_kept``, ``penalty``,
    ``rms``, ``mask_flips``, ``strength`` (see :class:`~prox24_lightning.monitoring.statistics.SparsityStats`), ``phase``
    (0 dense, 1 sparsify, 2 frozen) and ``step`` (real optimizer steps, as Prox24 counts them); for each layer under
    ``<name>_layers/<weight>/``.

    Args:
        every_n_steps: optimizer steps between two looks; also at the first and last step and when a phase begins.
        histograms_every_n_steps: least number of steps between two histograms of every weight; 0 for none.
        figures_every_n_steps: least number of steps between two overview figures and mask pictures; 0 for one
            overview at the end only. Drawing takes about a second.
        per_layer: log every layer too.
        picture_layers: how many weights the mask picture shows, evenly spread over the model; 0 for none.
        overview: draw the overview figure at the end.
        progress_bar: show the share of 2:4 groups as ``2:4``.
        summary: print a table at the end.
        targets: used without a Prox24 only: patterns of weights to watch.
        skip: used without a Prox24 only: patterns of weights to leave out.
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
        progress_bar: bool = True,
        summary: bool = True,
        targets: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        name: str = "sparsity",
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps} must be at least 1; to log nothing, remove SparsityMonitor"
            )
        for argument, value in (
            ("histograms_every_n_steps", histograms_every_n_steps),
            ("figures_every_n_steps", figures_every_n_steps),
            ("picture_layers", picture_layers),
        ):
            if value < 0:
                raise ValueError(f"{argument}={value} must not be negative; 0 switches it off")
        if not name or "/" in name:
            raise ValueError(f"name={name!r} is a prefix of tags and a file name; use letters, digits, '_' and '-'")
        self.every_n_steps = every_n_steps
        self.histograms_every_n_steps = histograms_every_n_steps
        self.figures_every_n_steps = figures_every_n_steps
        self.per_layer = per_layer
        self.picture_layers = picture_layers
        self.overview = overview
        self.progress_bar = progress_bar
        self.summary = summary
        self.targets = targets
        self.skip = skip
        self.name = name
        self._output = MonitorOutput()
        self._tracks: list[Track] = []
        self._loaded: dict[str, Any] = {}
        self._begun = False
        self._last: dict[str, int] = {}
        self._seen_optimizer_steps: tuple[int, ...] = ()

    @property
    def histories(self) -> dict[str, SparsityHistory]:
        """The record of looks, by name of the Prox24 (or ``"model"`` without one)."""
        return {track.label: track.history for track in self._tracks}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    # When: Lightning's hooks.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begun = False  # until the first batch, what has been looked at belongs to an earlier run

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._output = MonitorOutput()
        records = self._loaded
        if not records and self._finished_steps(trainer):  # else a new run: what an earlier one saw is not its own
            records = {label: history.state_dict() for label, history in self.histories.items()}
        self._loaded = {}
        self._tracks = []
        watched = self._watched(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        for label, prox, weights in watched:
            history = SparsityHistory([weight.name for weight in weights])
            with self._output.guarded("reading the history in the checkpoint"):
                if label in records and tuple(records[label]["layers"]) == history.layers:
                    history = SparsityHistory.from_state_dict(records[label])
            history.rewind(self._finished_steps(trainer))
            self._tracks.append(Track(label, prox, weights, history))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Only now has every other callback restored its state, wherever it stands in the list of callbacks.
        steps = self._finished_steps(trainer)
        for track in self._tracks:
            if track.prox is not None:
                track.prox.look_at_next_step(self._begun and self._due("look", self.every_n_steps, steps + 1))
        if self._tracks and not self._begun:
            self._begun = True
            self._last = {"look": steps, "histograms": steps, "figures": steps}
            self._phase_begins(trainer, steps)
            self._look(trainer, steps)
            if self.histograms_every_n_steps and steps == 0:
                self._histograms(trainer, steps)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._tracks or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        steps = self._finished_steps(trainer) + 1  # Lightning adds this one after the hook
        if not self._phase_begins(trainer, steps):
            if not self._due("look", self.every_n_steps, steps):
                return
            count = self._optimizer_steps(trainer)
            if count == self._seen_optimizer_steps and any(count):
                return  # a manual loop that accumulates by itself: wait until it steps again
        self._look(trainer, steps)
        if self._due("histograms", self.histograms_every_n_steps, steps):
            self._histograms(trainer, steps)
        if self._due("figures", self.figures_every_n_steps, steps):
            self._figures(trainer, steps)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tracks and self._begun:
            steps = self._finished_steps(trainer)
            self._look(trainer, steps)
            if self.overview:
                self._figures(trainer, steps)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The progress bar has left the terminal by now.
        for track in self._tracks:
            if self.summary and self._begun and track.layers:
                shapes = {weight.name: tuple(weight.parameter.shape) for weight in track.weights}
                with self._output.guarded("printing the summary"):
                    print_summary(track.layers, shapes, track.describe())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The device may be lost; what has been read so far is not.
        for track in self._tracks:
            if self.overview and self._begun:
                self._overview(trainer, track)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._loaded or {label: history.state_dict() for label, history in self.histories.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    # What.

    def _watched(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[tuple[str, Prox24 | None, tuple[GroupedWeight, ...]]]:
        """Label, Prox24 and weights of what is watched."""
        callbacks = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Prox24) and callback.weights
        ]
        if callbacks:
            return [(callback.name, callback, callback.weights) for callback in callbacks]
        try:
            weights = select_weights(pl_module, targets=self.targets, skip=self.skip).chosen
        except ValueError as error:
            if self.targets is not None or self.skip is not None:
                raise MisconfigurationException(f"SparsityMonitor: {error}") from error
            rank_zero_warn(f"SparsityMonitor has nothing to look at: {error}")
            return []
        if not weights:
            rank_zero_warn("SparsityMonitor has nothing to look at: no weight of the model can be 2:4")
            return []
        return [("model", None, weights)]

    def _look(self, trainer: Trainer, steps: int) -> None:
        self._last["look"] = steps
        self._seen_optimizer_steps = self._optimizer_steps(trainer)
        metrics: dict[str, float] = {}
        groups = sparse = 0.0
        with self._output.guarded("looking at the weights"):
            for track in self._tracks:
                if track.look(steps):
                    layers = f"{self.name}_layers/" if self.per_layer else None
                    metrics.update(track.metrics(self._prefix(track), layers))
                for layer in track.layers.values():
                    groups += layer.groups
                    sparse += layer.groups * layer.groups_24
            if self.progress_bar:
                # The dict behind the bar keeps a value until it is replaced, and a plain number costs no wait for the
                # device at each refresh, as a value given to LightningModule.log would.
                trainer.progress_bar_metrics["2:4"] = round(sparse / groups, 3)
        self._output.metrics(trainer, metrics, steps)

    def _histograms(self, trainer: Trainer, steps: int) -> None:
        self._last["histograms"] = steps
        weights = [weight for track in self._tracks for weight in track.weights]
        self._output.histograms(trainer, f"{self.name}_weights/", weights, steps)

    def _figures(self, trainer: Trainer, steps: int) -> None:
        self._last["figures"] = steps
        for track in self._tracks:
            self._overview(trainer, track)
            if self.picture_layers and tensorboard_loggers(trainer):
                with self._output.guarded("drawing the mask picture"):
                    title = f"masks after {steps} steps: corners of the weights"
                    image = rendered(mask_figure(track.pictures(self.picture_layers), title))
                    self._output.image(trainer, f"{self._prefix(track)}masks", image, steps)

    def _overview(self, trainer: Trainer, track: Track) -> None:
        with self._output.guarded("drawing the overview figure"):
            if len(track.history) and self._output.wants_images(trainer):
                image = rendered(overview_figure(track.history, track.describe()))
                # The name of a Prox24 may hold a path within the model.
                stem = self.name if len(self._tracks) == 1 else f"{self.name}_{track.label.replace('/', '_')}"
                self._output.png(trainer, stem, image)
                self._output.image(trainer, f"{self._prefix(track)}overview", image, track.history.steps[-1])

    # Counting.

    def _phase_begins(self, trainer: Trainer, steps: int) -> bool:
        """Mark, in log and console, the phases that have begun since the last batch."""
        begins = [track for track in self._tracks if track.begins_phase(steps)]
        for track in begins:
            text = f"{track.label}: phase {track.history.phases[-1][1]} after step {steps}"
            rank_zero_info(text)
            self._output.text(trainer, f"{self._prefix(track)}phase_changes", text, steps)
        return bool(begins)

    def _prefix(self, track: Track) -> str:
        return f"{self.name}/{track.label}/" if len(self._tracks) > 1 else f"{self.name}/"

    def _due(self, what: str, every: int, steps: int) -> bool:
        """Whether a multiple of ``every`` has been reached since ``what`` was last done."""
        return every > 0 and steps // every > self._last[what] // every

    def _optimizer_steps(self, trainer: Trainer) -> tuple[int, ...]:
        """Optimizer steps as far as anyone counts them; all zero in a manual loop over bare optimizers."""
        return (trainer.global_step, *(track.prox.step for track in self._tracks if track.prox is not None))

    @staticmethod
    def _finished_steps(trainer: Trainer) -> int:
        """Batches that led to a step: the x-axis of everything that Lightning logs."""
        return trainer.fit_loop.epoch_loop._batches_that_stepped
