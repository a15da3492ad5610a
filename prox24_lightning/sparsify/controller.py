"""One run from dense to frozen, for the callback of any training framework to own and call."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prox24_lightning.finetune import save_masks
from prox24_lightning.mask import violations_24
from prox24_lightning.sparsify.checks import check_optimizers, check_place, check_weights, optimized
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.engine import SparsityEngine
from prox24_lightning.sparsify.make_strategy import make_strategy
from prox24_lightning.sparsify.model_watch import ModelChange, ModelWatch
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.phases import Phase, PhasePlan, resolve_plan
from prox24_lightning.sparsify.solve_watch import SolveWatch
from prox24_lightning.sparsify.sparse_training import SparseTraining
from prox24_lightning.sparsify.strategies.base import Strategy
from prox24_lightning.sparsify.strategies.keep_zeros import KeepZeros
from prox24_lightning.sparsify.strategies.post_step.strategy import PostStepProx
from prox24_lightning.sparsify.traps import traps
from prox24_lightning.sparsify.zeros import only_24
from prox24_lightning.utils.distributed import rank
from prox24_lightning.weights.selection import GroupedWeight, Selection, SkippedWeight, select_weights
from prox24_lightning.weights.sharded import local_part, reshard

log = logging.getLogger(__name__)


class SparsifyController:
    """Check, start, resume and end a run; between that the engine works on its own.

    A callback decides when: :meth:`prepare` once model and optimizers exist, :meth:`restore` once a checkpoint has
    been read, :meth:`bind` when training begins, :meth:`before_batch`, and at the end :meth:`check_end`,
    :meth:`write_masks` and :meth:`unbind`.

    Args:
        config: the user's settings.
        root_is_called: whether training calls the model itself, rather than parts of it.

    Attributes:
        selection: the weights that become 2:4, and those that stay dense with the reason; empty before :meth:`prepare`.
        is_restored: whether :meth:`restore` has been called since :meth:`prepare`.
        watch: shows and stops the solving of blocks; a host sets its own before :meth:`prepare`.
    """

    def __init__(self, config: SparsifyConfig, *, root_is_called: bool = True) -> None:
        self.config = config
        self.root_is_called = root_is_called
        self.selection = Selection((), ())
        self._engine: SparsityEngine | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._previous: SparsityEngine | None = None  # of the last fit of this model, until restore takes it up
        self._sparse = SparseTraining()
        self._watch: ModelWatch | None = None
        self._claimed: frozenset[str] = frozenset()
        self._total_steps: int | float = 0
        self._shown_phase: Phase | None = None
        self.is_restored = True
        self.watch = SolveWatch()

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
    def dense_until(self) -> int:
        """The last step after which all weights may still be dense; up to it :attr:`masks` tell whether they are."""
        plan = self._require_engine().plan
        return plan.freeze if self.config.strategy == "progressive" else plan.start

    @property
    def pass_statistics(self) -> PassStatistics | None:
        """Statistics from the passes that change the weights; None before a fit."""
        return None if self._engine is None else self._engine.statistics

    def measure_next_step(self, wanted: bool) -> None:
        """Collect statistics of the weights, or none, in the pass that changes them after the next optimizer step."""
        if self._engine is not None:
            self._engine.statistics.wanted = wanted

    def metric_scale(self, name: str) -> Tensor | None:
        """Return the scale of a weight's metric now in use, which broadcasts to it; None for its own coordinates."""
        return None if self._engine is None else self._engine.metric_scale(name)

    def save_masks(self, path: str | Path) -> Path:
        """Write the frozen masks to a file that :func:`~prox24_lightning.load_masks` reads; all ranks call it.

        Raises:
            ValueError: before the freeze.
        """
        config = self.config
        info = {"step": self.step, "name": config.name, "strategy": config.strategy, "geometry": config.geometry}
        return save_masks(path, self.weights, self.masks, info)

    def prepare(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        total_steps: int | float,
        claimed: Mapping[str, Selection],
        *,
        exact: bool = True,
    ) -> SparsityEngine:
        """Choose the weights and make the engine. A second fit of the same model goes on where the first stopped.

        Args:
            total_steps: length of the run; ``inf`` or negative if it is not known.
            claimed: weights of other instances, by their names.
            exact: whether ``total_steps`` is exact; otherwise :meth:`before_batch` gets better estimates.

        Raises:
            ValueError: if model, optimizers and arguments do not fit together.
        """
        config = self.config
        self.unbind()  # a run that was interrupted where the host has no hook for it still listens
        check_optimizers(optimizers)
        check_place(config.masks_file)
        selection = self._select(model, optimizers, explicit=config.targets is not None)
        plan = resolve_plan(*config.phase_steps, total_steps, exact=exact)
        self._total_steps = total_steps
        check_weights(selection, claimed, config.name, moved=config.strategy != "keep")
        self._claimed = frozenset(weight.name for other in claimed.values() for weight in other)
        same_model = self._model is not None and self._model() is model
        self._previous = self._previous or self._engine if same_model else None
        self.selection = selection
        self._engine = SparsityEngine(self.weights, plan, self._make_strategy(model), metric=config.metric, model=model)
        self._engine.on_dense.append(self._leave_dense)
        self._model = weakref.ref(model)
        self.is_restored, self._shown_phase = False, None
        if config.sparse_training:
            engine = self._engine
            engine.on_masks.append(lambda: self._sparse.attach(engine.weights, engine.masks))
        return self._engine

    def restore(self, state: dict[str, Any], global_step: int) -> None:
        """Take over a checkpoint's state; call when everything else is restored, before :meth:`bind`.

        Args:
            state: what :meth:`state_dict` returned; empty if there is no checkpoint, or it holds none of ours.
            global_step: the host's own count of finished steps, for a checkpoint that holds none of ours.

        Raises:
            ValueError: if the state belongs to other weights or to another strategy.
        """
        engine = self._require_engine()
        self.is_restored = True
        previous, self._previous = self._previous, None
        if not state and previous is not None:
            state = previous.state_dict()
        if state:
            engine.load_state_dict(state)
        elif global_step > engine.step:
            engine.step = global_step
            _warn(
                f"the checkpoint holds no state of Prox24 (name={self.config.name!r}): it was written without the "
                f"callback; going on from step {engine.step} as {engine.plan.phase(engine.step)}, with masks "
                "still to be chosen"
            )
        else:
            for trap in traps(self.config, engine.plan, self._total_steps, self.weights):
                _warn(trap)

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Work between the steps of these optimizers from now on."""
        check_optimizers(optimizers)
        if self._model is not None and (model := self._model()) is not None:
            reshard(model)  # a validation before the first batch may have left gathered copies
        engine = self._require_engine()
        engine.bind(optimizers)
        if self._model is not None and (model := self._model()) is not None:
            self._watch = ModelWatch(model, self.weights, optimizers)
        if self.config.sparse_training:
            self._sparse.attach(self.weights, engine.masks)

    def end_sparse_training(self) -> None:
        """Give the layers that train on sparse tensor cores their own forward back."""
        self._sparse.remove()

    def unbind(self) -> None:
        """Remove every hook; masks and counters stay."""
        self.end_sparse_training()
        if self._engine is not None:
            self._engine.unbind()

    def before_batch(self, optimizers: Sequence[Optimizer], total_steps: int | float | None = None) -> None:
        """Prepare for a batch; if the host has exchanged its optimizers, go on with the new ones.

        Args:
            total_steps: length of the run as it is estimated now; None if that has not changed.

        Raises:
            RuntimeError: if a weight was replaced by a parameter that they do not train.
        """
        engine = self._require_engine()
        if not engine.is_bound_to(optimizers):
            _warn("the optimizers were replaced during the run; going on with the new ones, their state masked")
            self.bind(optimizers)
        if self._watch is not None and self._watch.has_changed(optimizers):
            self._follow_model(optimizers)
        if total_steps is not None:
            self.change_length(total_steps)
        engine.before_batch()

    def after_batch(self, optimizers: Sequence[Optimizer]) -> None:
        """The batch has ended: validation and other calls of the model are no training.

        Layers that were exchanged during the batch get their masks here, before anything is saved.
        """
        self._require_engine().after_batch()
        if self._watch is not None and self._watch.has_changed(optimizers):
            self._follow_model(optimizers)

    def _follow_model(self, optimizers: Sequence[Optimizer]) -> None:
        """Go on with the layers that the model has now, and with those that have begun to train.

        Raises:
            RuntimeError: if a layer was exchanged and no optimizer trains the new one.
        """
        model, engine = None if self._model is None else self._model(), self._require_engine()
        if model is None:
            return
        self._watch = ModelWatch(model, (), optimizers)  # what cannot be followed is named once
        try:
            selection = self._select(model, optimizers, explicit=False)
        except ValueError as error:
            _warn(f"the model has changed at step {self.step}, and {self.config.name} cannot follow: {error}")
            return
        change = ModelChange.between(self.weights, model, selection, {*self._claimed, *engine.left_dense})
        if change.lost:
            lost = ", ".join(f"{name} ({reason})" for name, reason in change.lost.items())
            _warn(f"layers were exchanged at step {self.step} for some that stay dense: {lost}")
        if change.joined:
            _warn(f"from step {self.step} on also these weights become 2:4: {', '.join(change.joined)}")
        if change and change.weights:
            self.selection = Selection(change.weights, selection.skipped)
            self._sparse.remove()
            engine.follow(self.weights, self._strategy_to_go_on(model), self._plan_to_go_on())
            self.bind(optimizers)

    def _strategy_to_go_on(self, model: nn.Module) -> Strategy:
        """Return the strategy in use, or a fresh one where it is made for the modules that the model had."""
        strategy = self._require_engine().strategy
        return strategy if isinstance(strategy, PostStepProx) else self._make_strategy(model)

    def _plan_to_go_on(self) -> PhasePlan:
        """Return the present plan; what joins late is pruned in what is left of the phase, one step at least."""
        engine = self._require_engine()
        if isinstance(engine.strategy, KeepZeros):
            return engine.plan
        if engine.phase == "dense" or (engine.phase == "sparsify" and isinstance(engine.strategy, PostStepProx)):
            return engine.plan
        return PhasePlan(engine.step, max(engine.plan.freeze, engine.step + 1))

    def change_length(self, total_steps: int | float) -> None:
        """Lay the phases out anew, if the run is estimated to have another number of steps than before."""
        if total_steps != self._total_steps:
            self._total_steps = total_steps
            plan = resolve_plan(*self.config.phase_steps, total_steps, exact=False)
            self._require_engine().change_plan(plan)

    def freeze_now(self) -> None:
        """Freeze what is not frozen yet: the run, whose length was an estimate, ends here."""
        self._require_engine().freeze_now()

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

    def check_loaded(self, model: nn.Module) -> None:
        """Warn if the weights of the trained model have been exchanged for those of a checkpoint that is not 2:4."""
        if self.phase != "frozen" or self._model is None or self._model() is not model:
            return
        dense = [w.name for w in self.weights if violations_24(local_part(w.parameter), dim=w.dim)]
        if dense:
            _warn(
                f"the model is not 2:4 now ({dense[0]} and {len(dense) - 1} more): a checkpoint from before the freeze "
                f"at step {self.freeze_step} has been loaded; load one that was written after it"
            )

    def new_phase(self) -> str | None:
        """Return a line that names the phase, if it is another one than at the last call in this run; else None."""
        shown, self._shown_phase = self._shown_phase, self.phase
        if self.phase == shown or not self.config.verbose:
            return None
        return f"{self.config.name}: phase {self.phase} {'after' if shown else 'at'} step {self.step}"

    def pauses(self) -> str | None:
        """Return in words how long training has paused to solve layers; None if it has not."""
        strategy = self._require_engine().strategy
        if not strategy.solve_seconds:
            return None
        return (
            f"{self.config.name}: solving layers took {strategy.solve_seconds:.1f} s of the run, "
            f"the longest pause between two steps {strategy.longest_pause:.2f} s"
        )

    def where(self) -> str:
        """Return in words where the run is: its step and phase, and what was being solved when it was stopped."""
        text = f"after step {self.step}, in phase {self.phase!r}"
        if (state := self.watch.interrupted) is None:
            return text
        return f"{text}, while it solved {state.place}: weights are as before"

    def write_masks(self) -> None:
        """Write ``masks_file``, if there is one and the masks are frozen; all ranks call it."""
        if self.config.masks_file is not None and self.phase == "frozen":
            self.save_masks(self.config.masks_file)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, in plain types and tensors; all ranks call it."""
        engine = self._previous or self._engine
        return {} if engine is None else engine.state_dict()

    def _select(self, model: nn.Module, optimizers: Sequence[Optimizer], *, explicit: bool) -> Selection:
        config = self.config
        selection = select_weights(model, targets=config.targets, skip=config.skip, geometry=config.geometry)
        selection = optimized(selection, optimizers, explicit=explicit)
        if config.strategy == "keep" and selection.chosen:
            selection = only_24(selection, explicit=explicit)
        return selection

    def _make_strategy(self, model: nn.Module) -> Strategy:
        return make_strategy(self.config, model, self.weights, self.watch, root_is_called=self.root_is_called)

    def _leave_dense(self, reasons: Mapping[str, str]) -> None:
        left = [
            SkippedWeight(w.name, type(w.module).__name__, tuple(w.parameter.shape), reasons[w.name])
            for w in self.selection.chosen
            if w.name in reasons
        ]
        chosen = tuple(weight for weight in self.selection.chosen if weight.name not in reasons)
        self.selection = Selection(chosen, (*self.selection.skipped, *left))
        if left and self.config.verbose and rank() == 0:
            log.info("%s: %d of %d weights stay dense within the budget", self.config.name, len(left), len(chosen))

    def _require_engine(self) -> SparsityEngine:
        if self._engine is None:
            raise RuntimeError("the steps of a run are known once a fit has started")
        return self._engine


def _warn(text: str) -> None:
    if rank() == 0:
        warnings.warn(text, stacklevel=3)
