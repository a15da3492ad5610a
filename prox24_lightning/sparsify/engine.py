"""The phases of a run, free of any training framework: dense, sparsify, frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from prox24_lightning.calibration.statistics.input_second_moment import InputSecondMoments
from prox24_lightning.finetune import MaskedParameters
from prox24_lightning.finetune.optimizers import masters_of
from prox24_lightning.mask import pack_mask, unpack_mask
from prox24_lightning.solvers.input_order.choose import ChosenOrder
from prox24_lightning.sparsify.checks import check_finite, check_same_weights, has_replaced
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.phases import Phase, PhasePlan
from prox24_lightning.sparsify.reordering import Companions, move_all, optimizer_companions
from prox24_lightning.sparsify.step_listener import StepListener
from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, RunContext, Strategy, projected_mask
from prox24_lightning.utils.distributed import check_same, rank
from prox24_lightning.weights.groups import Dim
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part, part_of, whole

Metric = Literal["weight", "activation"]

STATE_VERSION = 3
MOMENT_WARMUP = 32
"""Steps before ``start`` from which on the second moments of layer inputs are collected."""
MOMENT_EVERY = 4
"""They are collected in every fourth step: they change slowly, and reading inputs costs a pass over memory."""

log = logging.getLogger(__name__)


class SparsityEngine:
    """Take ``weights`` from dense to frozen 2:4 as their optimizers step.

    A host (a training framework's callback) binds the optimizers when training starts, calls :meth:`before_batch`
    before each batch and :meth:`after_batch` after it, and unbinds at the end. Everything else follows from the
    optimizers' own steps.

    Args:
        weights: the weights that become 2:4.
        plan: the steps at which the phases begin; one step is one real step of any bound optimizer.
        strategy: how weights become 2:4 in the sparsify phase.
        metric: coordinates of the prox and the masks: the weights', or scaled by the rms of each layer input.
        model: what holds the weights, if parts of it may be compiled: hooks must be there before that happens.
    """

    def __init__(
        self,
        weights: Sequence[GroupedWeight],
        plan: PhasePlan,
        strategy: Strategy,
        *,
        metric: Metric = "weight",
        model: nn.Module | None = None,
    ) -> None:
        if metric not in get_args(Metric):
            raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(get_args(Metric))}")
        self.weights = tuple(weights)
        self.plan = plan
        self.strategy = strategy
        self.metric = metric
        self.step = 0
        self._batch_step = 0  # the step to which the last batch led
        self.masked = MaskedParameters()
        self.statistics = PassStatistics()
        self.companions: list[Companions] = []  # what moves with the weights, beside the optimizers' state
        self.left_dense: dict[str, str] = {}  # weights that a budget leaves dense, and why
        self.on_dense: list[Callable[[Mapping[str, str]], None]] = []  # called when weights are left dense
        self.on_masks: list[Callable[[], None]] = []  # called after weights got their masks: block after block
        self.on_frozen: list[Callable[[], None]] = []  # called once, when every weight has its mask
        self._begun = False
        self._start = plan.start  # as it was when the phase began
        self._frozen = False
        self._model = model
        self._settled: frozenset[str] = frozenset()  # frozen before the strategy was exchanged: not its business
        self._moments = self._make_moments()
        self._listener = StepListener(self._after_step)
        self._owned: dict[int, list[GroupedWeight]] = {}
        self._optimizers: tuple[Optimizer, ...] = ()
        self._bound: dict[str, nn.Parameter] = {}

    @property
    def phase(self) -> Phase:
        """The phase that the run is in; ``"frozen"`` only once every weight has its mask."""
        if self._frozen:
            return "frozen"
        return "sparsify" if self.step > self.plan.start or self._begun else "dense"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name, bool, True where a weight stays; empty before the freeze.

        Of a sharded weight this rank's part.
        """
        return self.masked.masks

    def _make_moments(self) -> InputSecondMoments | None:
        scaled = self.strategy.scaled_weights(self.weights) if self.metric == "activation" else ()
        return InputSecondMoments(scaled, model=self._model) if scaled else None

    def metric_scale(self, name: str) -> Tensor | None:
        """Return the scale of a weight's metric now in use; None for the weight's own coordinates."""
        return None if self._moments is None else self._moments.scale(name)

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Work between the steps of ``optimizers`` from now on; apply the masks that there are."""
        self.unbind()
        self._optimizers = tuple(optimizers)
        self._bound = {weight.name: weight.parameter for weight in self.weights}
        self.masked.masters = masters_of(optimizers, [weight.parameter for weight in self.weights])
        trained_as = self.masked.masters.get
        names = {id(trained_as(weight.parameter, weight.parameter)): weight for weight in self.weights}
        for optimizer in optimizers:
            held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            self._owned[id(optimizer)] = [names[key] for key in held if key in names]
        self._listener.bind(optimizers)
        for weight in self.weights:
            if weight.name in self.masks:
                self.masked.apply(weight.name, weight.parameter, self.masks[weight.name])
        self.masked.mask_optimizer_state(optimizers)
        if self._frozen:
            return
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = frozenset([*self.masked.masters, *(parameter for group in groups for parameter in group["params"])])
        weights = tuple(weight for weight in self.weights if weight.name not in self._settled)
        self.strategy.attach(RunContext(weights, self.plan, self.metric_scale, trained, self._leave_dense, self._move))
        if self._moments is not None:
            self._moments.attach()
        if self.step >= self.plan.freeze:
            self._freeze()

    def unbind(self) -> None:
        """Remove every hook; counters, masks and statistics stay."""
        self._listener.unbind()
        self._owned.clear()
        self._optimizers = ()
        self._bound.clear()
        self.masked.release_all()
        self.strategy.detach()
        if self._moments is not None:
            self._moments.detach()

    def is_bound_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Return whether the engine works between the steps of these very optimizers."""
        return self._listener.listens_to(optimizers)

    def before_batch(self) -> None:
        """Prepare for a batch: decide whether statistics of its layer inputs are collected.

        Raises:
            RuntimeError: if the model now uses another parameter in a weight's place than the optimizers train.
        """
        self._listener.before_batch(weight.parameter for weight in self.weights)
        if has_replaced(self.weights, self._bound, self._optimizers):
            self.bind(self._optimizers)
        if not self._frozen:
            self.strategy.before_batch(self.step + 1)
        if self._moments is not None:
            self._moments.collecting = self._wants_moments(self.step + 1)
        self._batch_step = self.step + 1

    def follow(self, weights: Sequence[GroupedWeight], strategy: Strategy, plan: PhasePlan) -> None:
        """Go on with other weights: layers of the model were exchanged, or have begun to train. Call :meth:`bind` then.

        Masks stay with the weights that have the same name and shape. Where others have none yet the sparsify phase
        begins once more, for these alone.

        Args:
            weights: all weights that are or become 2:4.
            strategy: the one in use, or a fresh one.
            plan: the steps of the phases.
        """
        self.unbind()
        shapes = {weight.name: local_part(weight.parameter).shape for weight in weights}
        for name in [name for name, mask in self.masks.items() if shapes.get(name) != mask.shape]:
            del self.masked.masks[name]
        means = None if self._moments is None else self._moments.state_dict()
        self.weights, self.strategy, self.plan = tuple(weights), strategy, plan
        self._moments = self._make_moments()
        if self._moments is not None and means is not None:
            self._moments.load_state_dict(means)
        if len(self.masks) < len(self.weights):
            self._settled = frozenset(self.masks)
            self._begun = self._frozen = False

    def change_plan(self, plan: PhasePlan) -> None:
        """Go on with other steps for the phases. What has begun stays begun, and what is frozen stays frozen."""
        if self._frozen or plan == self.plan:
            return
        if self._begun:
            plan = PhasePlan(self._start, max(plan.freeze, self._start))
        self.plan = plan
        self.strategy.change_plan(plan)

    def freeze_now(self) -> None:
        """Freeze what is not frozen yet, whatever the plan: the run ends here."""
        if self._frozen:
            return
        if not self._begun:
            self._begin()
        self._freeze()

    def after_batch(self) -> None:
        """The batch has ended: what the model is called with until the next one begins is no training."""
        if not self._frozen:
            self.strategy.after_batch()
        if self._moments is not None:
            self._moments.collecting = False

    def _wants_moments(self, step: int) -> bool:
        if self._frozen or step > self.plan.freeze or step <= self.plan.start - MOMENT_WARMUP:
            return False
        # Every step of the first few, so that a short run has statistics as well. Several optimizers may take more
        # than one step a batch.
        passed = step // MOMENT_EVERY > self._batch_step // MOMENT_EVERY
        return passed or step % MOMENT_EVERY == 0 or step <= min(MOMENT_EVERY, self.plan.freeze)

    def _after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        owned = self._owned[id(optimizer)]
        self.masked.after_step(optimizer, [weight.name for weight in owned])
        if self._frozen:
            return
        if self._moments is not None and self._moments.collecting:
            self._moments.fold()
        if self.step > self.plan.start and not self._begun:
            self._begin()
        self.statistics.forget()
        if self.step >= self.plan.freeze:
            self._freeze()
        elif self.step > self.plan.start:
            waiting = [weight for weight in owned if weight.name not in self.masks]
            collected = self.statistics if self.statistics.wanted else None
            with self.masked.carry_writes(self._optimizers):
                masks = self.strategy.after_step(OptimizerStep(self.step, waiting, collected))
            self._enforce(masks)

    def _leave_dense(self, reasons: Mapping[str, str]) -> None:
        """Take weights out of the run."""
        self.left_dense |= reasons
        self.weights = tuple(weight for weight in self.weights if weight.name not in reasons)
        for owned in self._owned.values():
            owned[:] = [weight for weight in owned if weight.name not in reasons]
        context = self.strategy.context
        weights = tuple(weight for weight in context.weights if weight.name not in reasons)
        self.strategy.context = replace(context, weights=weights)
        for callback in self.on_dense:
            callback(reasons)

    def _move(self, chosen: Sequence[ChosenOrder]) -> None:
        """Bring inputs into other orders, where all that is kept beside the weights can move along."""
        moved = move_all(chosen, [optimizer_companions(self._optimizers), *self.companions])
        if chosen and rank() == 0:
            gain = sum(one.change for one in moved) / max(1, len(moved))
            log.info("the inputs of %d layers are in another order: %+.1f %% pruned saliency", len(moved), 100 * gain)

    def _begin(self) -> None:
        if self._moments is not None and (missing := self._moments.missing()):
            log.warning(
                "no inputs were seen for %s: the metric of these weights is their own magnitude, not their layers' "
                "activations (metric='weight' takes it for all)",
                ", ".join(missing),
            )
        self.strategy.begin()
        self._begun, self._start = True, self.plan.start

    def _freeze(self) -> None:
        """Freeze what is not frozen yet, and enforce all masks from now on."""
        self.strategy.before_finish()
        waiting = [weight for weight in self.weights if weight.name not in self.masks]
        with self.masked.carry_writes(self._optimizers):
            masks = self.strategy.finish(waiting)
            for weight in waiting:  # solved before an interrupt that came before its mask
                if weight.name not in masks:
                    masks[weight.name] = projected_mask(weight, self.metric_scale(weight.name))
        self._enforce(masks)
        self._frozen = True  # only now: an interrupt in the middle of the solve leaves the phase as it was
        self.statistics.end()
        self.strategy.detach()
        if self._moments is not None:
            self._moments.detach()
        for callback in self.on_frozen:
            callback()

    def _enforce(self, masks: Masks) -> None:
        """Enforce the masks of newly frozen weights, in the optimizers' state too."""
        if not masks:
            return
        parameters = {weight.name: weight.parameter for weight in self.weights}
        for name, mask in masks.items():
            self.masked.apply(name, parameters[name], mask)
        self._check_ranks({name: whole(mask, parameters[name]) for name, mask in masks.items()})
        self.masked.mask_optimizer_state(self._optimizers)
        for callback in self.on_masks:
            callback()

    def _check_ranks(self, masks: dict[str, Tensor]) -> None:
        check_same(masks, "the masks", local_part(self.weights[0].parameter).device)

    def state_dict(self) -> dict[str, Any]:
        """Return what a new process needs to continue bit for bit: plain types and tensors only.

        In a distributed run all ranks call it. What is sharded or counted by each rank is gathered, so that a run of
        another number of ranks can read it.

        Raises:
            RuntimeError: if a weight is not finite, or the ranks' masks differ.
        """
        parameters = {weight.name: weight.parameter for weight in self.weights}
        masks = {name: whole(mask, parameters[name]) for name, mask in self.masks.items()}
        check_finite(self.weights, self.step)
        self._check_ranks(masks)
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "batch_step": self._batch_step,
            "start": self.plan.start,
            "phase": self.phase,
            "begun": self._begun,
            "settled": sorted(self._settled),
            "weights": self._dims(),
            "left_dense": dict(self.left_dense),
            "masks": {name: {"bits": pack_mask(mask), "shape": list(mask.shape)} for name, mask in masks.items()},
            "strategy": {"kind": type(self.strategy).__name__, **self.strategy.state_dict()},
            "moments": None if self._moments is None else self._moments.state_dict(),
        }

    def _dims(self) -> dict[str, Dim]:
        return {weight.name: weight.dim for weight in self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another engine over the same weights; call before :meth:`bind`.

        Raises:
            ValueError: if the state's version is unknown, its masks belong to other weights, or another strategy was at
                work when it was saved.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"sparsity state of version {state.get('version')} cannot be read; expected {STATE_VERSION}"
            )
        self._leave_dense(state.get("left_dense", {}))
        weights = {weight.name: weight for weight in self.weights}
        if state["phase"] != "dense":
            check_same_weights(state["weights"], self._dims())
        masks = state["masks"]
        for name, packed in masks.items():
            shape = tuple(weights[name].parameter.shape)
            if tuple(packed["shape"]) != shape:
                raise ValueError(f"the mask of {name!r} has shape {tuple(packed['shape'])}, the weight {shape}")
        kind, mine = state["strategy"]["kind"], type(self.strategy).__name__
        if kind != mine and state["phase"] == "sparsify":
            raise ValueError(
                f"the checkpoint was written while {kind} was making the weights 2:4, and {mine} cannot go on from "
                "there; keep the strategy until the freeze, or resume from a checkpoint before start"
            )
        self.step, self._batch_step = state["step"], state["batch_step"]
        self._begun, self._start = state["begun"], state["start"]
        self._frozen, self._settled = state["phase"] == "frozen", frozenset(state["settled"])
        for name, packed in masks.items():
            parameter = weights[name].parameter
            mask = unpack_mask(packed["bits"], packed["shape"]).to(local_part(parameter).device)
            self.masked.masks[name] = part_of(mask, parameter)
        if kind == mine and state["weights"] == self._dims():
            self.strategy.load_state_dict(state["strategy"], weights)
        if self._moments is not None and state["moments"] is not None:
            self._moments.load_state_dict(state["moments"])
