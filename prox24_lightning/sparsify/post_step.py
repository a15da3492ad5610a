"""The plain strategy: the prox after every optimizer step, with a strength that grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.groups import GroupedWeight
from prox24_lightning.prox import prox_24
from prox24_lightning.schedules import Schedule
from prox24_lightning.sparsify.strength import strength_for_fraction

ScaleOf = Callable[[str], Tensor | None]


class PostStepProx:
    """Proximal gradient with the user's optimizer as the gradient step.

    Args:
        strength: relative strength at every progress; the prox uses it divided by the rms of the weight (in
            the metric's coordinates) at the start of the phase. None finds the strength from ``fraction``.
        fraction: share of groups that shall be 2:4 at every progress, used when ``strength`` is None.
    """

    def __init__(self, strength: Schedule | None, fraction: Schedule) -> None:
        self.strength = strength
        self.fraction = fraction
        self.strengths: dict[str, Tensor] = {}
        self._rms: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, weights: Sequence[GroupedWeight], scale_of: ScaleOf) -> None:
        """Take each weight's scale, once, before the first prox."""
        for weight in weights:
            values, scale = weight.parameter.detach().float(), scale_of(weight.name)
            values = values if scale is None else values * scale
            self._rms[weight.name] = values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def step(self, weight: GroupedWeight, progress: float, scale: Tensor | None) -> None:
        """Apply the prox to ``weight`` in place."""
        values = weight.parameter.detach()
        if self.strength is None:
            strength = strength_for_fraction(values, self.fraction(progress), dim=weight.dim, scale=scale)
        else:
            strength = self.strength(progress) / self._rms[weight.name]
        self.strengths[weight.name] = strength
        prox_24(values, strength, dim=weight.dim, scale=scale, out=values)

    def state_dict(self) -> dict[str, Any]:
        return {"rms": dict(self._rms), "strengths": dict(self.strengths)}

    def load_state_dict(self, state: dict[str, Any], device_of: Callable[[str], torch.device]) -> None:
        self._rms = {name: value.to(device_of(name)) for name, value in state["rms"].items()}
        self.strengths = {name: value.to(device_of(name)) for name, value in state["strengths"].items()}
