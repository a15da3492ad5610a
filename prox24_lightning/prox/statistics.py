"""What a pass of the prox can say of its results, so that to watch them costs no pass of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.weights.groups import group_shape

NUMBERS = 10


@dataclass(frozen=True)
class ProxStatistics:
    """Filled by a pass that writes its results.

    Attributes:
        sums: float32 ``(10,)``: squares, squares in the metric, those of the two smallest of each group, penalty in the
            metric, groups with 0, 1, 2, 3, 4 zeros, and how many entries of the top-two mask differ from ``before``.
        code: uint8, of :func:`~prox24_lightning.weights.groups.group_shape`: bit i is set if entry i is one of the two largest
            of its group, in the metric.
        before: the code of another look at this weight, or ``code`` itself where there is none: the flips then mean
            nothing.
    """

    sums: Tensor
    code: Tensor
    before: Tensor


def empty_statistics(weight: Tensor, dim: int, sums: Tensor, before: Tensor | None = None) -> ProxStatistics:
    """A look to be filled; ``sums`` are ten zeros, ``dim`` is non-negative."""
    code = torch.empty(group_shape(weight.shape, dim), dtype=torch.uint8, device=weight.device)
    return ProxStatistics(sums, code, code if before is None else before)
