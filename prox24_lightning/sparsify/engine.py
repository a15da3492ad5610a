"""The life of the masks, free of any training framework: dense, sparsify, frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from prox24_lightning.finetune import MaskedParameters
from prox24_lightning.groups import GroupedWeight
from prox24_lightning.mask import pack_mask, unpack_mask
from prox24_lightning.moments import InputMoments
from prox24_lightning.sparsify.phases import Phase, PhasePlan
from prox24_lightning.sparsify.steps import StepListener
from prox24_lightning.sparsify.strategy import Frozen, Strategy

Metric = Literal["weight", "activation"]

STATE_VERSION = 1
MOMENT_WARMUP = 32
"""Steps before ``start`` from which layer inputs are looked at."""
MOMENT_EVERY = 4
"""Inputs are looked at on every fourth step: they change slowly, and reading them costs a pass over memory."""

log = logging.getLogger(__name__)


class SparsityEngine:
    """Takes ``weights`` from dense to frozen 2:4 as their optimizers step.

    A host (a training framework's callback) binds the optimizers when training starts, calls :meth:`before_batch`
    before each batch, and unbinds at the end. Everything else follows from the optimizers' own steps.

    Args:
        weights: the parameters that shall be 2:4.
        plan: the steps at which the phases begin; one step is one real step of any bound optimizer.
        strategy: how weights become 2:4 in the sparsify phase.
        metric: coordinates of the prox and the masks: the weights', or scaled by the rms of each layer input.
    """

    def __init__(
        self,
        weights: Sequence[GroupedWeight],
        plan: PhasePlan,
        strategy: Strategy,
        *,
        metric: Metric = "weight",
    ) -> None:
        if metric not in get_args(Metric):
            raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(get_args(Metric))}")
        self.weights = tuple(weights)
        self.plan = plan
        self.strategy = strategy
        self.metric = metric
        self.step = 0
        self.masked = MaskedParameters()
        self.on_freeze: list[Callable[[], None]] = []
        self._begun = False
        self._frozen = False
        scaled = strategy.scaled_weights(self.weights) if metric == "activation" else ()
        self._moments = InputMoments(scaled) if scaled else None
        self._listener = StepListener(self._after_step)
        self._owned: dict[int, list[GroupedWeight]] = {}
        self._optimizers: tuple[Optimizer, ...] = ()

    @property
    def phase(self) -> Phase:
        """The phase that the finished steps have led to."""
        return "frozen" if self._frozen else self.plan.phase(self.step)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Frozen masks by weight name, bool, True where a weight stays; empty before the freeze."""
        return self.masked.masks

    def metric_scale(self, name: str) -> Tensor | None:
        """The scale of a weight's metric now in use; None where it is the weight's own coordinates."""
        return None if self._moments is None else self._moments.scale(name)

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """Start listening to ``optimizers`` and, if frozen, mask weights, gradients and their state again."""
        self.unbind()
        self._optimizers = tuple(optimizers)
        names = {id(weight.parameter): weight for weight in self.weights}
        for optimizer in optimizers:
            held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            self._owned[id(optimizer)] = [names[key] for key in held if key in names]
        self._listener.bind(optimizers)
        for weight in self.weights:
            if weight.name in self.masks:
                self.masked.hold(weight.name, weight.parameter, self.masks[weight.name])
        self.masked.mask_optimizer_state(optimizers)
        if self._frozen:
            return
        self.strategy.attach(self.weights, self.plan)
        if self._moments is not None:
            self._moments.attach()
        if self.step >= self.plan.freeze:
            self._freeze()

    def unbind(self) -> None:
        """Remove every hook; counters, masks and moments stay."""
        self._listener.unbind()
        self._owned.clear()
        self._optimizers = ()
        self.masked.release_all()
        self.strategy.detach()
        if self._moments is not None:
            self._moments.detach()

    def is_bound_to(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether these very optimizers are being listened to."""
        return self._listener.listens_to(optimizers)

    def before_batch(self) -> None:
        """Tell the engine that a batch begins: decides whether its layer inputs are looked at."""
        self._listener.reset()
        if not self._frozen:
            self.strategy.before_batch(self.step + 1)
        if self._moments is not None:
            self._moments.collecting = self._wants_moments(self.step + 1)

    def _wants_moments(self, step: int) -> bool:
        if self._frozen or step > self.plan.freeze or step <= self.plan.start - MOMENT_WARMUP:
            return False
        # Every step until something has been seen, so that a run of few steps has moments as well.
        return step % MOMENT_EVERY == 0 or step <= min(MOMENT_EVERY, self.plan.freeze)

    def _after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        owned = self._owned[id(optimizer)]
        self.masked.mask_weights(weight.name for weight in owned)
        if self._frozen:
            return
        if self._moments is not None and self._moments.collecting:
            self._moments.fold()
        if self.step > self.plan.start and not self._begun:
            self._begin()
        if self.step >= self.plan.freeze:
            self._freeze()
        elif self.step > self.plan.start:
            waiting = [weight for weight in owned if weight.name not in self.masks]
            self._hold(self.strategy.after_step(self.step, waiting, self.metric_scale))

    def _begin(self) -> None:
        self._begun = True
        if self._moments is not None and (missing := self._moments.missing()):
            log.warning(
                "no inputs were seen for %s: the metric of these weights is their own magnitude, not their layers' "
                "activations",
                ", ".join(missing),
            )
        self.strategy.begin(self.weights, self.metric_scale)

    def _freeze(self) -> None:
        """Freeze what is not frozen yet, and hold all masks from now on."""
        waiting = [weight for weight in self.weights if weight.name not in self.masks]
        self._hold(self.strategy.finish(waiting, self.metric_scale))
        self._frozen = True
        self.strategy.detach()
        if self._moments is not None:
            self._moments.detach()

    def _hold(self, frozen: Frozen) -> None:
        """Write the values of newly frozen weights and hold their masks, in the optimizer's state too."""
        if not frozen:
            return
        parameters = {weight.name: weight.parameter for weight in self.weights}
        for name, (mask, values) in frozen.items():
            with torch.no_grad():
                parameters[name].copy_(values)
            self.masked.hold(name, parameters[name], mask)
        self.masked.mask_optimizer_state(self._optimizers)
        for callback in self.on_freeze:
            callback()

    def state_dict(self) -> dict[str, Any]:
        """Everything a new process needs to go on bit for bit: plain types and tensors only."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "phase": self.phase,
            "begun": self._begun,
            "masks": {name: {"bits": pack_mask(mask), "shape": list(mask.shape)} for name, mask in self.masks.items()},
            "strategy": self.strategy.state_dict(),
            "moments": None if self._moments is None else self._moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another engine over the same weights; call before :meth:`bind`.

        Raises:
            ValueError: if the state's version is unknown, or its masks belong to other weights.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"sparsity state of version {state.get('version')} cannot be read; expected {STATE_VERSION}"
            )
        weights = {weight.name: weight for weight in self.weights}
        masks = state["masks"]
        frozen = state["phase"] == "frozen"
        if set(masks) - set(weights) or (frozen and set(masks) != set(weights)):
            lost, new = sorted(set(masks) - set(weights)), sorted(set(weights) - set(masks))
            raise ValueError(
                f"the checkpoint's masks belong to other weights: only in the checkpoint: {lost or 'none'}; "
                f"only in the model: {new or 'none'}; use the targets and skip that the checkpoint was written with"
            )
        for name, packed in masks.items():
            shape = tuple(weights[name].parameter.shape)
            if tuple(packed["shape"]) != shape:
                raise ValueError(f"the mask of {name!r} has shape {tuple(packed['shape'])}, the weight {shape}")
        self.step = state["step"]
        self._begun = state["begun"]
        self._frozen = frozen

        def device_of(name: str) -> torch.device:
            return weights[name].parameter.device

        for name, packed in masks.items():
            self.masked.masks[name] = unpack_mask(packed["bits"], packed["shape"]).to(device_of(name))
        self.strategy.load_state_dict(state["strategy"], device_of)
        if self._moments is not None and state["moments"] is not None:
            self._moments.load_state_dict(state["moments"])
