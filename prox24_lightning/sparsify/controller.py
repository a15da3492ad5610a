"""What every host of the engine shares: the user's arguments, the checks, and the state of a run."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prox24_lightning.finetune import save_masks
from prox24_lightning.mask import violations_24
from prox24_lightning.schedules import FRACTION_CURVES, STRENGTH_SCHEDULES, Schedule, named_schedule
from prox24_lightning.sparsify.checks import check_optimizers, check_place, check_weights, optimized
from prox24_lightning.sparsify.config import StrategyName, check_arguments
from prox24_lightning.sparsify.engine import Metric, SparsityEngine
from prox24_lightning.sparsify.phases import Phase, resolve_plan
from prox24_lightning.sparsify.sparse_training import SparseTraining
from prox24_lightning.sparsify.strategies.base import StepLook, Strategy
from prox24_lightning.sparsify.strategies.post_step.strategy import PostStepProx, Refit
from prox24_lightning.sparsify.strategies.progressive.strategy import RECONSTRUCTION_STEPS, Progressive
from prox24_lightning.utils.distributed import rank
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.selection import GroupedWeight, Selection, select_weights
from prox24_lightning.weights.sharded import local_part, reshard


class Sparsifier:
    """One run from dense to frozen, for a training framework's callback to inherit from and call.

    The callback decides when: :meth:`prepare` once model and optimizers exist, :meth:`restore` once a checkpoint has
    been read, :meth:`before_batch`, :meth:`finish` and :meth:`unbind`. The arguments are those of
    :class:`~prox24_lightning.Prox24`.

    Attributes:
        root_is_called: whether training calls the model itself, rather than parts of it.
    """

    root_is_called = True

    def __init__(
        self,
        start: int | float = 0.02,
        freeze: int | float = 0.3,
        *,
        strategy: StrategyName = "progressive",
        dense_target: float = 0.5,
        reconstruction_steps: int = RECONSTRUCTION_STEPS,
        gradient_weighting: bool = True,
        metric: Metric = "activation",
        schedule: str | Schedule = "auto",
        fraction: str | Schedule = "cubic",
        targets: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        geometry: Geometry = "row",
        refit: Refit = "none",
        sparse_training: bool = False,
        masks_file: str | Path | None = None,
        name: str = "prox24",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_arguments(
            start,
            freeze,
            strategy,
            dense_target,
            reconstruction_steps,
            metric,
            schedule,
            targets,
            skip,
            geometry,
            refit,
            sparse_training,
            masks_file,
        )
        self.start = start
        self.freeze = freeze
        self.strategy = strategy
        self.dense_target = dense_target
        self.reconstruction_steps = reconstruction_steps
        self.gradient_weighting = gradient_weighting
        self.metric = metric
        self.schedule = None if schedule == "auto" else named_schedule(schedule, STRENGTH_SCHEDULES, "schedule")
        self.fraction = named_schedule(fraction, FRACTION_CURVES, "fraction")
        self.targets = targets
        self.skip = skip
        self.geometry = geometry
        self.refit = refit
        self.sparse_training = sparse_training
        self.masks_file = masks_file
        self.name = name
        self.verbose = verbose
        self.selection = Selection((), ())
        self._engine: SparsityEngine | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._loaded: dict[str, Any] = {}
        self._sparse = SparseTraining()

    # What monitors and final hooks read.

    @property
    def weights(self) -> tuple[GroupedWeight, ...]:
        """The weights that become 2:4; empty before the fit starts."""
        return self.selection.chosen

    @property
    def step(self) -> int:
        """Finished real optimizer steps."""
        return 0 if self._engine is None else self._engine.step

    @property
    def phase(self) -> Phase:
        """``"dense"``, ``"sparsify"`` or ``"frozen"``."""
        return "dense" if self._engine is None else self._engine.phase

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name (bool, True stays); empty before the freeze.

        Of a weight that is sharded (FSDP2, tensor parallelism) this rank's part.
        """
        return {} if self._engine is None else self._engine.masks

    @property
    def strengths(self) -> dict[str, Tensor]:
        """The strength last used for each weight: 0-dim tensors; empty before sparsification."""
        return {} if self._engine is None else self._engine.strategy.strengths

    @property
    def start_step(self) -> int:
        """``start`` as a step of the present run."""
        return self._require_engine().plan.start

    @property
    def freeze_step(self) -> int:
        """``freeze`` as a step of the present run."""
        return self._require_engine().plan.freeze

    @property
    def looks(self) -> dict[str, StepLook]:
        """What the passes that changed the weights have seen of them, by weight name; of few weights, or of none."""
        return {} if self._engine is None else self._engine.strategy.looks

    def look_at_next_step(self, wanted: bool) -> None:
        """Have the weights looked at, or not, in the pass that changes them after the next optimizer step."""
        if self._engine is not None:
            self._engine.strategy.looking = wanted

    def metric_scale(self, name: str) -> Tensor | None:
        """Scale of the metric now in use for a weight; broadcasts to it; None for the weight's own coordinates."""
        return None if self._engine is None else self._engine.metric_scale(name)

    def save_masks(self, path: str | Path) -> Path:
        """Write the frozen masks to a file that :func:`~prox24_lightning.load_masks` reads; all ranks call it.

        Raises:
            ValueError: before the freeze.
        """
        info = {"step": self.step, "name": self.name, "strategy": self.strategy, "geometry": self.geometry}
        return save_masks(path, self.weights, self.masks, info)

    # What the host's hooks call.

    def prepare(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        total_steps: int | float,
        claimed: Mapping[str, Selection],
    ) -> SparsityEngine:
        """Choose the weights and make the engine. A second fit of the same model goes on where the first stopped.

        Args:
            total_steps: length of the run; ``inf`` or negative if it is not known.
            claimed: weights of other instances, by their names.

        Raises:
            ValueError: if model, optimizers and arguments do not fit together.
        """
        self.unbind()  # a run that was interrupted where the host has no hook for it still listens
        check_optimizers(optimizers)
        check_place(self.masks_file)
        selection = select_weights(model, targets=self.targets, skip=self.skip, geometry=self.geometry)
        plan = resolve_plan(self.start, self.freeze, total_steps)
        selection = optimized(selection, optimizers, explicit=self.targets is not None)
        check_weights(selection, claimed, self.name)
        if self._engine is not None and self._model is not None and self._model() is model:
            self._loaded = self._loaded or self._engine.state_dict()
        self.selection = selection
        self._engine = SparsityEngine(self.weights, plan, self._make_strategy(model), metric=self.metric)
        self._model = weakref.ref(model)
        if self.sparse_training:
            engine = self._engine
            engine.on_freeze.append(lambda: self._sparse.attach(engine.weights, engine.masks))
        return self._engine

    def restore(self, global_step: int) -> None:
        """Take over the state that was loaded; call when everything is restored, before :meth:`bind`.

        Args:
            global_step: the host's own count of finished steps, for a checkpoint that holds none of ours.

        Raises:
            ValueError: if the state belongs to other weights, or another strategy is at work in it.
        """
        engine = self._require_engine()
        if self._loaded:
            engine.load_state_dict(self._loaded)
            self._loaded = {}
        elif global_step > engine.step:
            engine.step = global_step
            _warn(
                f"the checkpoint holds no state of {type(self).__name__} (name={self.name!r}): it was written without "
                f"the callback; going on from step {engine.step} as {engine.phase}, with masks still to be chosen"
            )

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Work between the steps of these optimizers from now on."""
        check_optimizers(optimizers)
        if self._model is not None and (model := self._model()) is not None:
            reshard(model)  # a validation before the first batch may have left gathered copies
        engine = self._require_engine()
        engine.bind(optimizers)
        if self.sparse_training:
            self._sparse.attach(self.weights, engine.masks)

    def end_sparse_training(self) -> None:
        """Give the layers that train on sparse tensor cores their own forward back."""
        self._sparse.remove()

    def unbind(self) -> None:
        """Remove every hook; masks and counters stay."""
        self.end_sparse_training()
        if self._engine is not None:
            self._engine.unbind()

    def before_batch(self, optimizers: Sequence[Optimizer]) -> None:
        """A batch begins, to be followed by a step of ``optimizers``: others than before are gone over to.

        Raises:
            RuntimeError: if a weight was replaced by a parameter that they do not train.
        """
        engine = self._require_engine()
        if not engine.is_bound_to(optimizers):
            _warn("the optimizers were replaced during the run; going on with the new ones, their state masked")
            self.bind(optimizers)
        engine.before_batch()

    def check_end(self) -> None:
        """Warn if the run ended before the freeze, or something has written to the pruned entries."""
        if self.phase != "frozen":
            _warn(
                f"the run ended at step {self.step} in phase {self.phase!r}, before the freeze at step "
                f"{self.freeze_step}: the model is not 2:4; train on from its last checkpoint, or set freeze lower"
            )
            return
        for weight in self.weights:
            if broken := violations_24(local_part(weight.parameter), dim=weight.dim):
                _warn(f"{weight.name} is frozen, yet something has written to its pruned entries: {broken}")

    def pauses(self) -> str | None:
        """How long the training has stood still for solving layers, in words; None if it has not."""
        strategy = self._require_engine().strategy
        if not strategy.seconds:
            return None
        return (
            f"{self.name}: solving layers took {strategy.seconds:.1f} s of the run, "
            f"the longest pause between two steps {strategy.longest_pause:.2f} s"
        )

    def write_masks(self) -> None:
        """Write ``masks_file``, if there is one and the masks are frozen; all ranks call it."""
        if self.masks_file is not None and self.phase == "frozen":
            self.save_masks(self.masks_file)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: plain types and tensors. In a distributed run all ranks call it."""
        if self._loaded or self._engine is None:
            return self._loaded
        return self._engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for :meth:`restore`."""
        self._loaded = state_dict

    def _make_strategy(self, model: nn.Module) -> Strategy:
        if self.strategy == "progressive":
            return Progressive(
                model,
                root_is_called=self.root_is_called,
                dense_target=self.dense_target,
                reconstruction_steps=self.reconstruction_steps,
                gradient_weighting=self.gradient_weighting,
            )
        return PostStepProx(self.schedule, self.fraction, refit=self.refit)

    def _require_engine(self) -> SparsityEngine:
        if self._engine is None:
            raise RuntimeError("the steps of a run are known once a fit has started")
        return self._engine


def _warn(text: str) -> None:
    if rank() == 0:
        warnings.warn(text, stacklevel=3)
