"""The plain strategy: the prox after every optimizer step, with a strength that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from prox24_lightning.prox import ProxTogether, prox_24
from prox24_lightning.prox.many_weights import can_go_together
from prox24_lightning.schedules import Schedule
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, Strategy, projected_mask
from prox24_lightning.sparsify.strategies.post_step.strength import strength_for_fraction, strengths_for_fraction
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded, local_part, part_of, whole

Refit = Literal["none", "restore"]


class PostStepProx(Strategy):
    """Proximal gradient with the user's optimizer as the gradient step.

    Args:
        strength: relative strength at every progress; the prox uses it divided by the rms of the weight (in
            the metric's coordinates) at the start of the phase. None finds the strength from ``fraction``.
        fraction: share of groups that shall be 2:4 at every progress, used when ``strength`` is None.
        refit: surviving weights at the freeze: ``"none"`` leaves them, ``"restore"`` puts the values back that
            they had before the first prox.
    """

    def __init__(self, strength: Schedule | None, fraction: Schedule, *, refit: Refit = "none") -> None:
        super().__init__()
        self.strength = strength
        self.fraction = fraction
        self.refit = refit
        self._rms: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        self._together: dict[torch.device, ProxTogether] = {}

    @torch.no_grad()
    def begin(self) -> None:
        weights = self.context.weights
        for weight in weights:
            values, scale = local_part(weight.parameter).float(), self.context.scale_of(weight.name)
            values = whole(values if scale is None else values * scale, weight.parameter)
            self._rms[weight.name] = values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        if self.refit == "restore":
            self._reference = {weight.name: local_part(weight.parameter).clone() for weight in weights}

    @torch.no_grad()
    def after_step(self, step: OptimizerStep) -> Masks:
        progress = self.context.plan.progress(step.number)
        together: dict[torch.device, list[GroupedWeight]] = {}
        for weight in step.weights:
            values = local_part(weight.parameter)
            if self._goes_together(weight, values):
                together.setdefault(values.device, []).append(weight)
            else:
                self.apply(weight, progress, self.context.scale_of(weight.name))
        for device, members in together.items():
            self._apply_together(device, members, progress, step.statistics)
        return {}

    def _goes_together(self, weight: GroupedWeight, values: Tensor) -> bool:
        """Whether one launch takes the weight along with others; not where a quantile over all ranks is needed."""
        whole_fraction = self.strength is not None or not is_sharded(weight.parameter)
        return isinstance(weight.dim, int) and whole_fraction and can_go_together(values)

    def _apply_together(
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
        launcher = self._together.setdefault(device, ProxTogether())
        if self.strength is None:
            fraction = self.fraction(progress)
            strengths = strengths_for_fraction(values, fraction, dims=dims, scales=scales, together=launcher)
        else:
            strengths = self.strength(progress) / torch.stack([self._rms[name] for name in names])
        codes = None if collected is None else collected.previous_codes(names, scales)
        statistics = launcher(values, strengths, dims, scales, settle=self.strength is None, befores=codes)
        if collected is not None:
            for name, value, scale, measured in zip(names, values, scales, statistics, strict=True):
                collected.record(name, value, scale, measured)
        self.strengths.update(zip(names, strengths.unbind(), strict=True))

    def apply(self, weight: GroupedWeight, progress: float, scale: Tensor | None) -> None:
        """One prox on ``weight``, in place."""
        parameter = weight.parameter
        values = local_part(parameter)
        if self.strength is None:
            gather = partial(whole, like=parameter, groups_along=weight.dim) if is_sharded(parameter) else None
            strength, applied = strength_for_fraction(
                values, self.fraction(progress), dim=weight.dim, scale=scale, gather=gather
            )
        else:
            strength = applied = self.strength(progress) / self._rms[weight.name]
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
