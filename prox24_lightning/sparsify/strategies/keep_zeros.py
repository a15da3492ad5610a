"""The strategy for a model that is 2:4 already: its zeros are the masks, from before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, Strategy, projected_mask
from prox24_lightning.weights.selection import GroupedWeight


class KeepZeros(Strategy):
    """Freeze weights that are 2:4 as they are: no value changes. Groups with more than two zeros keep two entries."""

    def scaled_weights(self, weights: Sequence[GroupedWeight]) -> Sequence[GroupedWeight]:
        return ()

    def begin(self) -> None:
        pass

    def after_step(self, step: OptimizerStep) -> Masks:
        return {}

    def finish(self, weights: Sequence[GroupedWeight]) -> Masks:
        return {weight.name: projected_mask(weight, None) for weight in weights}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        pass
