"""How strong the prox must be: found from the weights, so that nobody tunes lambda."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prox24_lightning.groups import Dim, group_dims
from prox24_lightning.prox import critical_strength_24

SAMPLED_GROUPS = 65536
"""Groups among which a quantile is looked up; its error, 1/sqrt(4n), is then 0.2 % of the groups."""


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
        :func:`~prox24_lightning.groups.group_shape` (:func:`~prox24_lightning.weight_blocks.block_shape`); both on the
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
