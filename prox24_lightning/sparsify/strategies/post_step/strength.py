"""How strong the prox must be: found from the weights, so that nobody tunes lambda."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prox24_lightning.prox import MultiTensorProx, critical_strength_24
from prox24_lightning.weights.groups import Dim, group_dims, resolve_group_dim

SAMPLED_GROUPS = 65536
"""Groups among which a quantile is looked up; its error, 1/sqrt(4n), is then 0.2 % of the groups."""

SAMPLED_TOGETHER = 16384
"""The same for each of many weights at once: 0.4 % of the groups."""


def strength_for_fraction(
    weight: Tensor,
    fraction: float,
    *,
    dim: Dim = -1,
    scale: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The least strength at which ``fraction`` of the groups of ``weight`` leave the prox 2:4, and whom it meets.

    Every group has a critical strength, from which on its prox is 2:4 and keeps the two survivors as they are
    (``prox/DERIVATION.md``); the answer is their quantile. Below its critical strength a group is only shrunk, and
    a prox repeated at every step would shrink all groups to 2:4 within a few steps, whatever the
    fraction. So a group gets the strength once its turn has come, and zero until then.

    Args:
        weight: floating tensor with groups along ``dim``.
        fraction: share of the groups in [0, 1].
        dim: dimension of the groups. A pair asks for 4 x 4 blocks, whose critical strength has no formula: they are
            ranked by the largest among those of their eight groups, and a block whose turn has come gets infinity,
            which projects it, as its critical strength does with a group.
        scale: the metric, as for :func:`~prox24_lightning.prox.prox_24`.
        gather: makes the whole weight's critical strengths of those of ``weight``, where that is one rank's part.

    Returns:
        The strength, a 0-dim tensor, and the same strength or zero for each group, of
        :func:`~prox24_lightning.weights.groups.group_shape` (:func:`~prox24_lightning.weights.blocks_4x4.block_shape`); both on the
        weight's device in units 1 / (weight * scale), float32 (float64 for float64 weights). No host synchronisation.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    dims = group_dims(weight.shape, dim)
    critical = critical_strength_24(weight, dim=dims[0], scale=scale)
    if len(dims) == 2:
        first, second = dims
        along = critical.unflatten(second, (-1, 4)).amax(second + 1)
        across = critical_strength_24(weight, dim=second, scale=scale).unflatten(first, (-1, 4)).amax(first + 1)
        critical = torch.maximum(along, across)
    flat = (critical if gather is None else gather(critical)).flatten()
    sample = flat[:: max(flat.numel() // SAMPLED_GROUPS, 1)]
    rank = math.ceil(fraction * sample.numel())
    if rank == 0:
        return torch.zeros((), dtype=critical.dtype, device=critical.device), torch.zeros_like(critical)
    # A little above the critical value, so that the group which gave it falls on the 2:4 side in any precision.
    strength = sample.kthvalue(rank).values * (1 + 1e-5)
    return strength, torch.where(critical <= strength, strength if len(dims) == 1 else torch.inf, 0.0)


def strengths_for_fraction(
    weights: Sequence[Tensor],
    fraction: float,
    *,
    dims: Sequence[int],
    scales: Sequence[Tensor | None],
    multi_tensor: MultiTensorProx | None = None,
) -> Tensor:
    """As :func:`strength_for_fraction`, for many weights in a few operations, from a sample of the groups of each.

    Applied by :func:`~prox24_lightning.prox.settle_24`, which leaves the groups alone that a strength does not meet.

    Args:
        weights: on one device.
        fraction: share of the groups of each in [0, 1].
        dims: dimension of the groups of each.
        scales: the metric of each, or None.
        multi_tensor: takes the sample of all weights in one launch, where it can take the weights at all.

    Returns:
        float32 ``(weights,)``, units 1 / (weight * scale). No host synchronisation.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    rank = math.ceil(fraction * SAMPLED_TOGETHER)
    if rank == 0:
        return torch.zeros(len(weights), device=weights[0].device)
    if multi_tensor is None:
        critical = _sampled_critical(weights, dims, scales)
    else:
        critical = multi_tensor.critical(weights, dims, scales, SAMPLED_TOGETHER)
    return critical.kthvalue(rank, dim=1).values * (1 + 1e-5)


def _sampled_critical(weights: Sequence[Tensor], dims: Sequence[int], scales: Sequence[Tensor | None]) -> Tensor:
    """Critical strengths of a sample of the groups of each weight: ``(weights, SAMPLED_TOGETHER)``."""
    sample = weights[0].new_empty((len(weights), SAMPLED_TOGETHER, 4), dtype=torch.float32)
    for place, weight, dim, scale in zip(sample, weights, dims, scales, strict=True):
        where = _sampled_entries(weight.shape, dim, weight.device)
        place.copy_(weight.detach()[where])
        if scale is not None:
            place.mul_(scale.detach().expand(weight.shape)[where])
    return critical_strength_24(sample).squeeze(-1)


@functools.lru_cache(maxsize=64)
def _sampled_entries(shape: torch.Size, dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of the entries of groups spread over a weight: ``(SAMPLED_TOGETHER, 4)`` for each dimension.

    Where there are fewer groups they are taken in turn. An odd stride does not stay in the same columns of a matrix.
    """
    dim = resolve_group_dim(shape, dim)
    reduced = (*shape[:dim], shape[dim] // 4, *shape[dim + 1 :])
    groups = math.prod(reduced)
    stride = max(1, groups // SAMPLED_TOGETHER) | 1
    chosen = torch.arange(SAMPLED_TOGETHER, device=device) * stride % groups
    places = list(torch.unravel_index(chosen, reduced))
    inside = torch.arange(4, device=device)
    return tuple(
        place.unsqueeze(1) * 4 + inside if axis == dim else place.unsqueeze(1).expand(-1, 4)
        for axis, place in enumerate(places)
    )
