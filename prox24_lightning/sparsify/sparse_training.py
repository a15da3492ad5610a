"""Training on sparse tensor cores after the freeze: layers are switched as their masks come, and back at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from prox24_lightning.convert.layers.transposable_linear import TransposableForward, why_not
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded, local_part

log = logging.getLogger(__name__)


class SparseTraining:
    """The linear layers whose forward pass and input gradient run on sparse tensor cores."""

    def __init__(self) -> None:
        self._layers: dict[str, TransposableForward] = {}

    def attach(self, weights: Sequence[GroupedWeight], masks: Mapping[str, Tensor]) -> None:
        """Switch every layer of ``weights`` that has a mask and fits; log the others with the reason."""
        for weight in weights:
            mask = masks.get(weight.name)
            if mask is None or weight.name in self._layers:
                continue
            if reason := _reason(weight, mask):
                log.info("%s trains on dense products: %s", weight.module_name, reason)
                continue
            self._layers[weight.name] = TransposableForward(weight.module, mask)  # type: ignore[arg-type]
            self._layers[weight.name].attach()

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers.values():
            layer.remove()
        self._layers.clear()


def _reason(weight: GroupedWeight, mask: Tensor) -> str | None:
    if type(weight.module) is not nn.Linear or weight.parameter_name != "weight":
        return f"{type(weight.module).__name__} is not a plain linear layer"
    if is_sharded(weight.parameter):
        return "its weight is sharded"
    if "forward" in vars(weight.module):
        return "its forward has been replaced already"
    return why_not(local_part(weight.parameter), mask)
