"""The progressive strategy: layer after layer goes 2:4 by the local squared loss, while the rest trains on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.groups import GroupedWeight
from prox24_lightning.layerwise.layers import SecondMoments, as_matrix, from_matrix, input_rows, why_not_solvable
from prox24_lightning.layerwise.solve import solve_layer
from prox24_lightning.mask import mask_24
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.sparsify.strategy import DeviceOf, ScaleOf, Strategy

MOMENT_STEPS = 8
"""Steps before a layer's turn during which its inputs are counted."""

log = logging.getLogger(__name__)


class Progressive(Strategy):
    """One layer after the other, in the order in which the model runs them, spread evenly over the sparsify phase.

    When its turn comes, a layer is solved by the paper's layer-wise prox on the second moments of its own inputs, taken
    from the last training batches with everything before it 2:4 already, and the survivors are refined by masked
    gradient (arXiv 2501.18015, section 3). It is frozen there and then; what comes after it trains on
    against it. Memory: the moments of the next few layers, float32 (in_features, in_features) each. A layer that
    the solver cannot take (a packed attention projection, a grouped convolution) is projected in the metric instead.

    Args:
        prox_steps: proximal steps a layer; None is the solver's own default.
    """

    def __init__(self, prox_steps: int | None = None) -> None:
        super().__init__()
        if prox_steps is not None and prox_steps < 1:
            raise ValueError(f"prox_steps={prox_steps} must be at least 1")
        self.prox_steps = prox_steps
        self._weights: dict[str, GroupedWeight] = {}
        self._plan = PhasePlan(0, 0)
        self._order: list[str] = []
        self._done: set[str] = set()
        self._collecting: set[str] = set()
        self._moments: dict[str, SecondMoments] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, weights: Sequence[GroupedWeight], plan: PhasePlan) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._plan = plan
        for weight in weights:
            if weight.name in self._done:
                continue

            def hook(module: nn.Module, args: tuple, name: str = weight.name) -> None:
                if torch.is_grad_enabled() and args and isinstance(args[0], Tensor):
                    self._see(name, module, args[0])

            self._handles.append(weight.module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._collecting.clear()

    def before_batch(self, step: int) -> None:
        self._collecting = {
            name
            for name, turn in self._turns().items()
            if name not in self._done and turn - MOMENT_STEPS < step <= turn
        }

    def begin(self, weights: Sequence[GroupedWeight], scale_of: ScaleOf) -> None:
        """Nothing to remember: every layer is taken as it stands when its turn comes."""

    @torch.no_grad()
    def after_step(
        self, step: int, weights: Sequence[GroupedWeight], scale_of: ScaleOf
    ) -> dict[str, tuple[Tensor, Tensor]]:
        turns = self._turns()
        due = [weight for weight in weights if weight.name not in self._done and turns[weight.name] <= step]
        return {weight.name: self.finish(weight, scale_of(weight.name)) for weight in due}

    @torch.no_grad()
    def finish(self, weight: GroupedWeight, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mask and values of the layer on the moments counted so far."""
        self._done.add(weight.name)
        self._collecting.discard(weight.name)
        moments = self._moments.pop(weight.name, None)
        if _world_size() > 1:
            moments = _reduced(moments, weight)
        if moments is not None and moments.tokens:
            try:
                solution = solve_layer(
                    as_matrix(weight.module),
                    moments.moments,
                    steps=self.prox_steps,
                    dim=weight.matrix_dim,
                    name=weight.name,
                )
            except ValueError as error:
                log.warning("%s; its largest weights are kept instead", error)
            else:
                values = from_matrix(weight.module, solution.weight).to(weight.parameter.dtype)
                return from_matrix(weight.module, solution.mask), values
        values = weight.parameter.detach()
        return mask_24(values, dim=weight.dim, scale=scale), values

    def _turns(self) -> dict[str, int]:
        """The step after which each layer is solved; the last one has its turn at the freeze."""
        order = [*self._order, *(name for name in self._weights if name not in set(self._order))]
        span = self._plan.freeze - self._plan.start
        return {name: self._plan.start + -(-span * (i + 1) // len(order)) for i, name in enumerate(order)}

    def _see(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        if name not in self._order:
            self._order.append(name)  # first seen, first solved
        weight = self._weights[name]
        if name in self._collecting and why_not_solvable(module, weight.parameter_name) is None:
            self._moments.setdefault(name, SecondMoments()).add(input_rows(module, inputs.detach()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": list(self._order),
            "done": sorted(self._done),
            "moments": {
                name: {"total": moments.total, "tokens": moments.tokens} for name, moments in self._moments.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any], device_of: DeviceOf) -> None:
        self._order = list(state["order"])
        self._done = set(state["done"])
        self._moments = {
            name: SecondMoments.of(moments["total"].to(device_of(name)), moments["tokens"])
            for name, moments in state["moments"].items()
        }


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _reduced(moments: SecondMoments | None, weight: GroupedWeight) -> SecondMoments | None:
    """The moments over all ranks; a rank that saw nothing adds zeros, unless no rank can see anything."""
    if why_not_solvable(weight.module, weight.parameter_name) is not None:
        return None
    size = as_matrix(weight.module).shape[1]
    moments = moments or SecondMoments()
    flat = torch.zeros(size * size + 1, dtype=torch.float64, device=weight.parameter.device)
    if moments.tokens:
        flat[:-1] = moments.moments.flatten() * moments.tokens
        flat[-1] = moments.tokens
    dist.all_reduce(flat)
    return SecondMoments.of(flat[:-1].view(size, size).float(), int(flat[-1]))
