"""The penalty that is zero exactly on 2:4 sparse groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prox24_lightning.weights.groups import Dim, check_scale, check_weight, group_dims, resolve_group_dim


def penalty_24(
    weight: Tensor, *, dim: Dim = -1, scale: Tensor | None = None, reduce: Literal["sum", "none"] = "sum"
) -> Tensor:
    """Return ``r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|`` for every group of four (arXiv 2501.18015).

    Differentiable by autograd, in ``weight`` and in ``scale``.

    Args:
        weight: float16, bfloat16 (both computed in float32), float32 or float64, any strides.
        dim: the dimension along which the groups lie; its size divides by 4. A pair: both, for 4 x 4 blocks.
        scale: positive, broadcasts to ``weight``; the penalty of ``weight * scale``.
        reduce: ``"sum"`` for one number, ``"none"`` for one a group.

    Returns:
        float32 (float64 for a float64 weight), units weight^3 (times scale^3): a scalar, or a tensor of
        :func:`~prox24_lightning.weights.groups.group_shape` (for a pair
        :func:`~prox24_lightning.weights.blocks_4x4.block_shape`: the sum over the eight groups of a block). 0 exactly
        where the group, or the block, is 2:4.

    Raises:
        ValueError: for an unknown ``reduce``, a dtype that is not a real floating one, or a bad ``dim``.
    """
    if reduce not in ("sum", "none"):
        raise ValueError(f"reduce={reduce!r} is unknown; use 'sum' or 'none'")
    check_weight(weight, "penalty_24", vmap="runs")
    if not weight.is_floating_point():
        raise ValueError(f"penalty_24 needs a real floating-point weight, got {weight.dtype}")
    if not isinstance(dim, int):
        first, second = group_dims(weight.shape, dim)
        along = penalty_24(weight, dim=first, scale=scale, reduce="none").unflatten(second, (-1, 4)).sum(second + 1)
        across = penalty_24(weight, dim=second, scale=scale, reduce="none").unflatten(first, (-1, 4)).sum(first + 1)
        return (along + across).sum() if reduce == "sum" else along + across
    dim = resolve_group_dim(weight.shape, dim)
    values = weight if weight.dtype == torch.float64 else weight.float()
    check_scale(scale, weight)
    if scale is not None:
        values = values * scale
    a, b, c, d = values.abs().unflatten(dim, (weight.shape[dim] // 4, 4)).unbind(dim + 1)
    penalty = a * b * (c + d) + c * d * (a + b)
    return penalty.sum() if reduce == "sum" else penalty
