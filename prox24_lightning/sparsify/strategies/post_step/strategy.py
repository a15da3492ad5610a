"""``post_step``: the prox after every optimizer step, with a strength that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from prox24_lightning.prox import MultiTensorProx, prox_24
from prox24_lightning.prox.multi_tensor import fits_multi_tensor
from prox24_lightning.schedules import Schedule
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, RunContext, Strategy, projected_mask
from prox24_lightning.sparsify.strategies.post_step.strength import strength_for_fraction, strengths_for_fraction
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded, local_part, part_of, whole

Refit = Literal["none", "restore"]


class PostStepProx(Strategy):
    """Proximal gradient descent with the user's optimizer as the gradient step.

    Args:
        strength_schedule: progress -> strength in units of 1 / rms of the weight (in the metric) at the start of the
            phase. None takes the strength from ``fraction_schedule``.
        fraction_schedule: progress -> share of the groups that are 2:4, used where ``strength_schedule`` is None.
        refit: surviving weights at the freeze: ``"none"`` leaves them, ``"restore"`` gives them the values that they
            had before the first prox.
    """

    def __init__(
        self, strength_schedule: Schedule | None, fraction_schedule: Schedule, *, refit: Refit = "none"
    ) -> None:
        super().__init__()
        self.strength_schedule = strength_schedule
        self.fraction_schedule = fraction_schedule
        self.refit = refit
        self._rms: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        self._multi_tensor: dict[torch.device, MultiTensorProx] = {}

    def attach(self, context: RunContext) -> None:
        before = {weight.name: weight.module for weight in self.context.weights}
        for weight in context.weights:
            if before.get(weight.name, weight.module) is not weight.module:  # exchanged for another layer
                self._rms.pop(weight.name, None)
                self._reference.pop(weight.name, None)
        super().attach(context)

    @torch.no_grad()
    def begin(self) -> None:
        weights = [weight for weight in self.context.weights if weight.name not in self._rms]
        for weight in weights:
            values, scale = local_part(weight.parameter).float(), self.context.scale_of(weight.name)
            values = whole(values if scale is None else values * scale, weight.parameter)
            self._rms[weight.name] = values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        if self.refit == "restore":
            self._reference |= {weight.name: local_part(weight.parameter).clone() for weight in weights}

    @torch.no_grad()
    def after_step(self, step: OptimizerStep) -> Masks:
        progress = self.context.plan.progress(step.number)
        by_device: dict[torch.device, list[GroupedWeight]] = {}
        for weight in step.weights:
            values = local_part(weight.parameter)
            if self._fits_multi_tensor(weight, values):
                by_device.setdefault(values.device, []).append(weight)
            else:
                self.apply(weight, progress, self.context.scale_of(weight.name))
        for device, members in by_device.items():
            self._apply_multi_tensor(device, members, progress, step.statistics)
        return {}

    def _fits_multi_tensor(self, weight: GroupedWeight, values: Tensor) -> bool:
        """Whether one launch takes the weight along with others; not where a quantile over all ranks is needed."""
        local = self.strength_schedule is not None or not is_sharded(weight.parameter)
        return isinstance(weight.dim, int) and local and fits_multi_tensor(values)

    def _apply_multi_tensor(
        self,
        device: torch.device,
        weights: Sequence[GroupedWeight],
        progress: float,
        collected: PassStatistics | None,
    ) -> None:
        names = [weight.name for weight in weights]
        values = [local_part(weight.parameter) for weight in weights]
        dims = [weight.dim for weight in weights if isinstance(weight.dim, int)]
        scales = [self.context.scale_of(name) for name in names]
        prox = self._multi_tensor.setdefault(device, MultiTensorProx())
        if self.strength_schedule is None:
            fraction = self.fraction_schedule(progress)
            strengths = strengths_for_fraction(values, fraction, dims=dims, scales=scales, multi_tensor=prox)
        else:
            strengths = self.strength_schedule(progress) / torch.stack([self._rms[name] for name in names])
        codes = None if collected is None else collected.previous_codes(names, scales)
        statistics = prox(values, strengths, dims, scales, settle=self.strength_schedule is None, previous_codes=codes)
        if collected is not None:
            for name, value, scale, measured in zip(names, values, scales, statistics, strict=True):
                collected.record(name, value, scale, measured)
        self.strengths.update(zip(names, strengths.unbind(), strict=True))

    def apply(self, weight: GroupedWeight, progress: float, scale: Tensor | None) -> None:
        """Apply the prox to ``weight``, in place."""
        parameter = weight.parameter
        values = local_part(parameter)
        if self.strength_schedule is None:
            gather = partial(whole, like=parameter, groups_along=weight.dim) if is_sharded(parameter) else None
            strength, applied = strength_for_fraction(
                values, self.fraction_schedule(progress), dim=weight.dim, scale=scale, gather=gather
            )
        else:
            strength = applied = self.strength_schedule(progress) / self._rms[weight.name]
        self.strengths[weight.name] = strength
        prox_24(values, applied, dim=weight.dim, scale=scale, out=values)

    @torch.no_grad()
    def finish(self, weights: Sequence[GroupedWeight]) -> Masks:
        masks = {weight.name: projected_mask(weight, self.context.scale_of(weight.name)) for weight in weights}
        for weight in weights:
            if weight.name in self._reference:
                local_part(weight.parameter).copy_(self._reference[weight.name])
        self._reference.clear()
        return masks

    def state_dict(self) -> dict[str, Any]:
        parameters = {weight.name: weight.parameter for weight in self.context.weights}
        reference = {name: whole(part, parameters[name]) for name, part in self._reference.items()}
        return {"rms": dict(self._rms), "strengths": dict(self.strengths), "reference": reference}

    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        self._rms, self.strengths, reference = (
            {name: value.to(local_part(weights[name].parameter).device) for name, value in state[part].items()}
            for part in ("rms", "strengths", "reference")
        )
        self._reference = {name: part_of(value, weights[name].parameter) for name, value in reference.items()}
