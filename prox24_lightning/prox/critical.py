"""The strength at which a group becomes 2:4."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.batched import chunk_size, chunks, quarters, sort_four

NEWTON = {torch.float32: 20, torch.float64: 40}


def critical_strength_24(weight: Tensor, *, dim: int = -1, scale: Tensor | None = None) -> Tensor:
    """The smallest strength at which :func:`~prox24_lightning.prox.prox_24` makes each group 2:4.

    For sorted magnitudes ``y1 >= y2 >= y3 >= y4`` it does not depend on ``y4``: a dense point never beats two entries
    unless a 3-sparse one does. It is ``y3 / (y1 y2)`` where the third entry reaches zero continuously, and a root of
    one scalar equation where it jumps (DERIVATION.md). No device synchronisation.

    Args:
        weight: float16, bfloat16, float32 or float64, any strides.
        dim: the dimension along which the groups lie; its size divides by 4.
        scale: positive, broadcasts to ``weight``; the strength then is that of ``prox_24(weight, ..., scale=scale)``.

    Returns:
        float32 (float64 for a float64 weight) tensor of :func:`~prox24_lightning.groups.group_shape`, units
        1/weight (1/(weight * scale) with ``scale``). 0 for a group that is 2:4 already and for one with an infinite
        entry, NaN for a group that holds NaN, infinity where the strength exceeds the largest number of the dtype.

    Raises:
        ValueError: for a dtype that is not a real floating one, or a bad ``dim``.
    """
    if not weight.is_floating_point():
        raise ValueError(f"critical_strength_24 needs a real floating-point weight, got {weight.dtype}")
    weight = weight.detach()
    dim = resolve_group_dim(weight.shape, dim)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shape = group_shape(weight.shape, dim)
    result = torch.empty(shape, dtype=compute, device=weight.device)
    source = quarters(weight, dim)
    scales = None if scale is None else quarters(scale.detach().to(compute).expand(weight.shape), dim)
    for part in chunks(shape, chunk_size(weight)):
        where = (slice(None), *part)
        y = source[where].to(compute).abs()
        if scales is not None:
            y = y * scales[where]
        result[part] = _critical(*sort_four(y)[:3])
    return result


def _critical(y1: Tensor, y2: Tensor, y3: Tensor) -> Tensor:
    # In units of y1 and y2: only ratios enter, so neither tiny nor huge weights lose anything.
    tiny = torch.finfo(y1.dtype).tiny
    square = (y2 / y1).nan_to_num_(nan=0.0) ** 2
    ratio = (y3 / y2).nan_to_num_(nan=0.0)
    jumps = ratio * ratio * (1 + square) > 1
    low, high = torch.zeros_like(square), torch.ones_like(square)
    x = ratio * square / (1 + square)
    for _ in range(NEWTON[y1.dtype]):
        p, q = 1 - x, 1 - square * x
        norm = (q * q + square * p * p).clamp_min_(tiny)
        inverse = norm.rsqrt()
        length = (1 - square * x * x) * inverse  # strength * y1 at which w1^2 + w2^2 = 1 for w3 = x * y2 / y1
        product = p * q / norm
        value = x + product - length * ratio
        half_change = -square * (p + q) / norm  # half the logarithmic derivative of norm
        slope = (
            1
            - (q + square * p) / norm
            - 2 * product * half_change
            + ratio * (2 * square * x * inverse + length * half_change)
        )
        low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
        step = x - value / slope
        x = torch.where((step > low) & (step < high), step, (low + high) / 2)
    p, q = 1 - x, 1 - square * x
    jump = (1 - square * x * x) * (q * q + square * p * p).clamp_min_(tiny).rsqrt() / y1
    smooth = ratio / y1
    result = torch.where(jumps, jump, smooth)
    result = torch.where((y3 > 0) & (y1 < torch.inf), result, 0.0)
    return torch.where(y1.isnan(), y1, result)
