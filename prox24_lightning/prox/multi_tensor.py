"""The prox of many weights in place, in as few launches as there are kinds of weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prox24_lightning.prox.dispatch import prox_path
from prox24_lightning.prox.statistics import SUMS, ProxStatistics, empty_statistics
from prox24_lightning.weights.groups import resolve_group_dim

if TYPE_CHECKING:
    from prox24_lightning.prox.triton.multi_tensor import WeightTable

ALIGNMENT = 16
"""Bytes that the kernel reads at a time."""


def fits_multi_tensor(weight: Tensor) -> bool:
    """Whether :class:`MultiTensorProx` takes ``weight``: if the fused kernel does, and its memory is aligned."""
    return prox_path(weight) == "triton" and weight.data_ptr() % ALIGNMENT == 0 and weight.numel() > 0


class MultiTensorProx:
    """``prox_24`` (or ``settle_24``) of many weights in place: one launch for each dtype and direction of groups.

    The addresses of the weights are written to the device once, and again when a weight has moved or others come. Once
    that is done a call neither waits for the device nor copies from the host, so that it can be captured in a CUDA
    graph.

    Attributes:
        launches: how many the last call took.
    """

    def __init__(self) -> None:
        self.launches = 0
        self._key: Hashable = None
        self._kinds: list[tuple[Tensor | None, list[int], WeightTable]] = []
        self._seen: list[tuple[Tensor, int]] = []

    @torch.no_grad()
    def __call__(
        self,
        weights: Sequence[Tensor],
        strengths: Tensor,
        dims: Sequence[int],
        scales: Sequence[Tensor | None],
        *,
        settle: bool = False,
        previous_codes: Sequence[Tensor | None] | None = None,
    ) -> list[ProxStatistics]:
        """Apply the prox to ``weights`` in place.

        Args:
            weights: such as :func:`fits_multi_tensor` takes, all on the device of ``strengths``.
            strengths: float32 ``(weights,)``: one each, units as for :func:`~prox24_lightning.prox.prox_24`. Values are
                not checked; a weight with a negative or NaN one becomes NaN.
            dims: dimension of the groups of each.
            scales: scale of each, or None; float32, broadcasting to the weight.
            settle: as :func:`~prox24_lightning.prox.settle_24`, not as ``prox_24``.
            previous_codes: asks for statistics of the results from the same pass: the code of the last statistics of
                each weight, from which the flips of the mask are counted, or None.

        Returns:
            statistics, one for each weight; none if ``previous_codes`` is None.

        Raises:
            ValueError: if a weight cannot go with the others, with its number.
        """
        self._prepare(weights, dims, scales, strengths.device)
        statistics: list[ProxStatistics | None] = [None] * len(weights)
        for index, numbers, table in self._kinds:
            mine = None
            if previous_codes is not None:
                sums = torch.zeros((len(numbers), SUMS), dtype=torch.float32, device=strengths.device)
                places = [resolve_group_dim(weights[number].shape, dims[number]) for number in numbers]
                mine = [
                    empty_statistics(weights[number], place, row, previous_codes[number])
                    for number, place, row in zip(numbers, places, sums, strict=True)
                ]
                for number, one in zip(numbers, mine, strict=True):
                    statistics[number] = one
            table.prox(strengths if index is None else strengths[index], settle=settle, statistics=mine)
        self.launches = len(self._kinds)
        return [one for one in statistics if one is not None]

    @torch.no_grad()
    def critical(
        self, weights: Sequence[Tensor], dims: Sequence[int], scales: Sequence[Tensor | None], samples: int
    ) -> Tensor:
        """Return the :func:`~prox24_lightning.prox.critical_strength_24` of ``samples`` groups spread over each weight.

        Where there are fewer groups they repeat. Arguments and errors as in a call.

        Returns:
            float32 ``(weights, samples)``, units 1 / (weight * scale).
        """
        device = weights[0].device
        self._prepare(weights, dims, scales, device)
        found = torch.empty((len(weights), samples), dtype=torch.float32, device=device)
        for index, _, table in self._kinds:
            if index is None:
                table.critical(found)
            else:
                found[index] = table.critical(found.new_empty((len(index), samples)))
        self.launches = len(self._kinds)
        return found

    def _prepare(
        self,
        weights: Sequence[Tensor],
        dims: Sequence[int],
        scales: Sequence[Tensor | None],
        device: torch.device,
    ) -> None:
        """Update the tables on the device, and the scales that have changed."""
        key = tuple(
            (weight.data_ptr(), weight.dtype, weight.shape, dim, None if scale is None else scale.shape)
            for weight, dim, scale in zip(weights, dims, scales, strict=True)
        )
        if key != self._key:
            self._kinds = self._sort(weights, dims, scales, device)
            self._key = key
            self._seen = []
        seen = [(scale, scale._version) for scale in scales if scale is not None]
        unchanged = len(seen) == len(self._seen) and all(
            scale is last and version == before
            for (scale, version), (last, before) in zip(seen, self._seen, strict=False)
        )
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if unchanged and not capturing:  # a graph copies what the scales are when it is replayed
            return
        self._seen = seen
        for _, numbers, table in self._kinds:
            if table.scales is not None:
                new = [scale for number in numbers if (scale := scales[number]) is not None]
                torch._foreach_copy_(
                    table.scales, [scale.expand_as(own) for scale, own in zip(new, table.scales, strict=True)]
                )

    def _sort(
        self, weights: Sequence[Tensor], dims: Sequence[int], scales: Sequence[Tensor | None], device: torch.device
    ) -> list[tuple[Tensor | None, list[int], WeightTable]]:
        kinds: dict[Hashable, list[int]] = {}
        places = [resolve_group_dim(weight.shape, dim) for weight, dim in zip(weights, dims, strict=True)]
        for number, (weight, place, scale) in enumerate(zip(weights, places, scales, strict=True)):
            if weight.device != device or not fits_multi_tensor(weight):
                raise ValueError(f"weight {number} cannot go with the others on {device}; use prox_24 for it")
            kind = (weight.dtype, weight.shape[place + 1 :].numel() == 1, scale is not None)
            kinds.setdefault(kind, []).append(number)
        from prox24_lightning.prox.triton.multi_tensor import WeightTable

        result = []
        for numbers in kinds.values():
            index = None if len(kinds) == 1 else torch.tensor(numbers).to(device, non_blocking=True)
            own = [_own_scale(scale, weights[i]) for i in numbers if (scale := scales[i]) is not None]
            chosen = [weights[number] for number in numbers]
            result.append((index, numbers, WeightTable(chosen, [places[i] for i in numbers], own or None)))
        return result


def _own_scale(scale: Tensor, weight: Tensor) -> Tensor:
    """Memory of the table's own for a scale; expanded for a weight of more than two dimensions, whose strides the
    kernel cannot follow otherwise."""
    shape = scale.shape if weight.dim() <= 2 else weight.shape
    return torch.empty(shape, dtype=torch.float32, device=weight.device)
