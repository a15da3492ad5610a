"""Statistics of a weight that a pass of the prox gathers on its way, so that they cost no pass of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.weights.groups import group_shape

SUMS = 10


@dataclass(frozen=True)
class ProxStatistics:
    """Statistics of the results of a prox, filled by the pass that writes them.

    Attributes:
        sums: float32 ``(10,)``: squares, squares in the metric, those of the two smallest of each group, penalty in the
            metric, groups with 0, 1, 2, 3, 4 zeros, and the number of entries in which the top-two mask differs from
            ``previous_code``.
        code: uint8, of :func:`~prox24_lightning.weights.groups.group_shape`: bit i is set if entry i is one of the two
            largest of its group, in the metric.
        previous_code: ``code`` of earlier statistics of this weight, or ``code`` itself where there are none: the last
            of the sums then means nothing.
    """

    sums: Tensor
    code: Tensor
    previous_code: Tensor


def empty_statistics(weight: Tensor, dim: int, sums: Tensor, previous_code: Tensor | None = None) -> ProxStatistics:
    """Return statistics to be filled; ``sums`` are ten zeros, ``dim`` is non-negative."""
    code = torch.empty(group_shape(weight.shape, dim), dtype=torch.uint8, device=weight.device)
    return ProxStatistics(sums, code, code if previous_code is None else previous_code)
