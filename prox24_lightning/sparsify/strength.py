"""How strong the prox must be: found from the weights, so that nobody tunes lambda."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prox24_lightning.groups import resolve_group_dim
from prox24_lightning.prox import critical_strength_24

SAMPLED_GROUPS = 16384
"""Groups that are looked at to find a quantile; its error, 1/sqrt(4n), is then 0.4 % of the groups."""


def strength_for_fraction(weight: Tensor, fraction: float, *, dim: int = -1, scale: Tensor | None = None) -> Tensor:
    """The least strength at which ``fraction`` of the groups of ``weight`` leave the prox 2:4.

    Every group has a critical strength, above which its prox is 2:4 (see ``prox/DERIVATION.md``); the
    answer is their quantile. Large weights are sampled at an even stride.

    Args:
        weight: floating tensor with groups along ``dim``.
        fraction: share of the groups in [0, 1]; 0 gives strength 0.
        dim: dimension of the groups.
        scale: the metric, as for :func:`~prox24_lightning.prox.prox_24`.

    Returns:
        0-dim tensor on the weight's device, units 1 / (weight * scale); no host synchronisation.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    dim = resolve_group_dim(weight.shape, dim)
    stride = max(weight.numel() // 4 // SAMPLED_GROUPS, 1)
    if stride > 1:
        across = max((axis for axis in range(weight.dim()) if axis != dim), key=lambda axis: weight.shape[axis])
        index = torch.arange(0, weight.shape[across], stride, device=weight.device)
        weight = weight.index_select(across, index)
        if scale is not None and scale.shape[across] > 1:
            scale = scale.index_select(across, index)
    critical = critical_strength_24(weight, dim=dim, scale=scale).flatten().float()
    rank = math.ceil(fraction * critical.numel())
    if rank == 0:
        return torch.zeros((), device=weight.device)
    # A little above the critical value, so that the group which gave it falls on the 2:4 side in any precision.
    return critical.kthvalue(rank).values * 1.001
