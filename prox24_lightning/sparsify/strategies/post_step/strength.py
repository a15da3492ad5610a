"""How strong the prox must be: taken from the weights, so that nobody tunes lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prox24_lightning.prox import MultiTensorProx, critical_strength_24
from prox24_lightning.utils.sampling import spread_sample
from prox24_lightning.weights.groups import Dim, group_dims

SAMPLED_GROUPS = 65536
"""Groups of one weight whose quantile is taken; its error, 1/sqrt(4n), is then 0.2 % of the groups."""

SAMPLED_GROUPS_EACH = 16384
"""The same for each of many weights in one launch: 0.4 % of the groups."""

ABOVE = 1 + 1e-5
"""A strength lies a little above a critical one, so that the group of that one becomes 2:4 in any precision."""


def strength_for_fraction(
    weight: Tensor,
    fraction: float,
    *,
    dim: Dim = -1,
    scale: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the least strength at which ``fraction`` of the groups of ``weight`` leave the prox 2:4, and that of each.

    Every group has a critical strength, from which on its prox is 2:4 and keeps the two survivors as they are
    (``prox/DERIVATION.md``); the strength is the quantile of these. Below its critical strength a group is only shrunk,
    and a prox repeated at every step would shrink all groups to 2:4 within a few steps, whatever the fraction. So a
    group gets the strength from its critical one on, and zero until then.

    Args:
        weight: floating tensor with groups along ``dim``.
        fraction: share of the groups in [0, 1].
        dim: dimension of the groups. A pair asks for 4 x 4 blocks, whose critical strength has no formula: they are
            ranked by the largest among those of their eight groups, and get infinity instead of the strength, which
            projects a block as its critical strength does with a group.
        scale: the metric, as for :func:`~prox24_lightning.prox.prox_24`.
        gather: makes the whole weight's critical strengths of those of ``weight``, where that is one rank's part.

    Returns:
        the strength, a 0-dim tensor, and the same strength or zero for each group, of
        :func:`~prox24_lightning.weights.groups.group_shape` (for a pair
        :func:`~prox24_lightning.weights.blocks_4x4.block_shape`); both on the weight's device in units
        1 / (weight * scale), float32 (float64 for float64 weights). No host synchronisation.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    _check(fraction)
    dims = group_dims(weight.shape, dim)
    critical = critical_strength_24(weight, dim=dims[0], scale=scale)
    if len(dims) == 2:
        first, second = dims
        along = critical.unflatten(second, (-1, 4)).amax(second + 1)
        across = critical_strength_24(weight, dim=second, scale=scale).unflatten(first, (-1, 4)).amax(first + 1)
        critical = torch.maximum(along, across)
    sample = spread_sample(critical if gather is None else gather(critical), SAMPLED_GROUPS)
    rank = math.ceil(fraction * sample.numel())
    if rank == 0:
        return torch.zeros((), dtype=critical.dtype, device=critical.device), torch.zeros_like(critical)
    strength = sample.kthvalue(rank).values * ABOVE
    return strength, torch.where(critical <= strength, strength if len(dims) == 1 else torch.inf, 0.0)


def strengths_for_fraction(
    weights: Sequence[Tensor],
    fraction: float,
    *,
    dims: Sequence[int],
    scales: Sequence[Tensor | None],
    multi_tensor: MultiTensorProx,
) -> Tensor:
    """Return the strength of :func:`strength_for_fraction` for each of many weights, from a sample of its groups.

    Apply it by :func:`~prox24_lightning.prox.settle_24`, which leaves alone the groups whose critical strength is
    larger.

    Args:
        weights: on one device, such as ``multi_tensor`` takes.
        fraction: share of the groups of each in [0, 1].
        dims: dimension of the groups of each.
        scales: the metric of each, or None.
        multi_tensor: computes the critical strengths of the sample of all weights in one launch a kind.

    Returns:
        float32 ``(weights,)``, units 1 / (weight * scale). No host synchronisation.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    _check(fraction)
    rank = math.ceil(fraction * SAMPLED_GROUPS_EACH)
    if rank == 0:
        return torch.zeros(len(weights), device=weights[0].device)
    critical = multi_tensor.critical(weights, dims, scales, SAMPLED_GROUPS_EACH)
    return critical.kthvalue(rank, dim=1).values * ABOVE


def _check(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
