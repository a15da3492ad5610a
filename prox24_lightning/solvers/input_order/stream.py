"""Choose the one order of the residual stream, for all the layers of a model that read it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prox24_lightning.solvers.input_order.choose import ChosenOrder
from prox24_lightning.solvers.input_order.search import best_order, pruned_saliency, saliency
from prox24_lightning.solvers.loss import check_layer
from prox24_lightning.utils.distributed import from_first
from prox24_lightning.weights.free_order import FreeOrder
from prox24_lightning.weights.layer_matrix import as_matrix

ENTRIES = (1 << 24, 1 << 28)
"""Saliencies that are kept at most, on a CPU and on a GPU (64 MiB and 1 GiB): of larger models rows are drawn."""


class StreamOrderSearch:
    """Gathers the saliencies of all layers that read the stream, and searches the order that loses least in all.

    A layer's rows count relative to the saliency that it loses in its present order, so that every layer counts alike.

    Args:
        free: what may move.
        layers: those of its consumers that become 2:4.
        device: where the search runs.
        limit: saliencies that are kept at most; None takes :data:`ENTRIES`.
    """

    def __init__(
        self, free: FreeOrder, layers: Iterable[nn.Module], device: torch.device, limit: int | None = None
    ) -> None:
        self.free = free
        self.layers = [layer for layer in free.consumers if layer in set(layers)]
        entries = sum(as_matrix(layer).numel() for layer in self.layers)
        most = ENTRIES[device.type == "cuda"] if limit is None else limit
        self._share = min(1.0, most / max(entries, 1))
        self._device = device
        self._generator = torch.Generator().manual_seed(0)
        self._found: list[Tensor] = []

    def add(self, layer: nn.Module, hessian: Tensor, name: str) -> None:
        """Take in one layer of :attr:`layers` with the Hessian of its inputs.

        Raises:
            ValueError: for inputs or weights that are not finite.
        """
        matrix = as_matrix(layer)
        check_layer(matrix, hessian, name)
        values = saliency(matrix, hessian.to(matrix), name=name)
        lost = pruned_saliency(values)
        rows = torch.randperm(len(values), generator=self._generator)[: math.ceil(self._share * len(values))]
        if lost > 0:
            self._found.append((values[rows.to(values.device)] / lost).float().to(self._device))

    def best(self) -> ChosenOrder | None:
        """Return the order that the search finds, the same on all ranks; None if it finds none that is better."""
        if not self._found:
            return None
        together = torch.cat(self._found)
        order = from_first(best_order(together).cpu())
        before, after = pruned_saliency(together), pruned_saliency(together[:, order.to(together.device)])
        return ChosenOrder(self.free, order, float(after / before - 1)) if after < before else None
