"""The strength at which a group becomes 2:4."""

from __future__ import annotations

import torch
from torch import Tensor, library

from prox24_lightning.prox.batched import chunk_size, keep_freed_memory, sort_four
from prox24_lightning.prox.dispatch import prox_path
from prox24_lightning.prox.roots import indicator
from prox24_lightning.weights.groups import check_scale, check_weight, chunks, group_shape, quarters, resolve_group_dim

NEWTON = {torch.float32: 3, torch.float64: 5}
"""Newton steps: relative error of the strength 1e-2, 1e-3, 1e-5, 2e-9 after 0, 1, 2, 3."""


def critical_strength_24(weight: Tensor, *, dim: int = -1, scale: Tensor | None = None) -> Tensor:
    """Return the smallest strength at which :func:`~prox24_lightning.prox.prox_24` makes each group 2:4.

    For sorted magnitudes ``y1 >= y2 >= y3 >= y4`` it does not depend on ``y4``: a dense point never beats two entries
    unless a 3-sparse one does. It is ``y3 / (y1 y2)`` where the third entry reaches zero continuously, and a root of
    one scalar equation where it jumps (DERIVATION.md). No device synchronisation.

    At this strength two and three entries are as good, so that rounding decides what ``prox_24`` returns there. A
    strength larger by a factor of 1.0001 makes every group 2:4.

    Args:
        weight: float16, bfloat16, float32 or float64, any strides.
        dim: the dimension along which the groups lie; its size divides by 4.
        scale: positive, broadcasts to ``weight``; the strength then is that of ``prox_24(weight, ..., scale=scale)``.

    Returns:
        float32 (float64 for a float64 weight) tensor of :func:`~prox24_lightning.weights.groups.group_shape`, units
        1/weight (1/(weight * scale) with ``scale``). 0 for a group that is 2:4 already and for one with an infinite
        entry, NaN for a group that holds NaN, infinity where the strength exceeds the largest number of the dtype.

    Raises:
        ValueError: for a dtype that is not a real floating one, or a size along ``dim`` that does not divide by
            4. One dimension only: 4 x 4 blocks have no such formula.
    """
    check_weight(weight, "critical_strength_24")
    if not weight.is_floating_point():
        raise ValueError(f"critical_strength_24 needs a real floating-point weight, got {weight.dtype}")
    if not isinstance(dim, int):
        raise ValueError(f"critical_strength_24 takes one dimension, got dim={dim}: 4 x 4 blocks have no such formula")
    check_scale(scale, weight)
    if torch.compiler.is_compiling():
        return _compiled_critical_24(weight.detach(), dim, scale)
    if prox_path(weight) == "triton":
        from prox24_lightning.prox.triton.launch import critical_24_triton

        return critical_24_triton(weight, dim=dim, scale=scale)
    if weight.device.type == "cpu":
        keep_freed_memory()
    weight = weight.detach()
    dim = resolve_group_dim(weight.shape, dim)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shape = group_shape(weight.shape, dim)
    result = torch.empty(shape, dtype=compute, device=weight.device)
    source = quarters(weight, dim)
    scales = None if scale is None else quarters(scale.detach().to(compute).expand(weight.shape), dim)
    for part in chunks(shape, chunk_size(weight)):
        where = (slice(None), *part)
        view = source[where].to(compute)
        y = torch.abs(view, out=torch.empty(view.shape, dtype=compute, device=weight.device))
        if scales is not None:
            y.mul_(scales[where])
        result[part] = _critical(*sort_four(y)[:3])
    return result


@library.custom_op(
    "prox24_lightning::critical_strength_24",
    mutates_args=(),
    schema="(Tensor weight, int dim, Tensor? scale) -> Tensor",
)
def _compiled_critical_24(weight: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    """``critical_strength_24`` as torch.compile sees it: one operation."""
    return critical_strength_24(weight, dim=dim, scale=scale)


@_compiled_critical_24.register_fake
def _(weight: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(group_shape(weight.shape, dim), dtype=dtype, device=weight.device)


def _critical(y1: Tensor, y2: Tensor, y3: Tensor) -> Tensor:
    # Only ratios enter, so neither tiny nor huge weights lose anything; 0/0 and inf/inf count as 0.
    info = torch.finfo(y1.dtype)
    square = (y2 / y1).nan_to_num_(nan=0.0).square_()  # (y2 / y1)^2
    ratio = (y3 / y2).nan_to_num_(nan=0.0)
    sigma = square + 1
    # How far into the jump: 0 at its border y3^2 (y1^2 + y2^2) = y1^2 y2^2, 1 for y3 = y2.
    depth = ratio * ratio
    depth = depth.sub_((1 - depth).div_(square.clamp_min(info.tiny)))
    jumps = indicator(torch.gt, depth, 0.0)
    depth.clamp_(0.0, 1.0)
    # The unknown x is w3 in units of y2 / y1. The start is a fit to the root, within 0.03.
    x = (0.04009 * square).sub_(0.3607).mul_(square).add_(0.40589).mul_(depth)
    x.add_((0.10643 * square).add_(0.23964).mul_(square).sub_(0.24518)).mul_(depth)
    x.add_((0.18269 * square).add_(0.32008)).mul_(depth)
    for _ in range(NEWTON[y1.dtype]):
        bend = square * x
        rest, norm = _norms(x, bend, sigma)
        length = norm.sqrt_()
        # value = 1 - 3 A x^2 + sigma A x^3 - ratio rest length, with A = square; slope is its derivative over A.
        pull = ratio * length
        value = torch.addcmul(1 - pull * rest, bend * x, (sigma * x).sub_(3))
        slope = (sigma * x).mul_(3).sub_(6).add_(pull, alpha=2).mul_(x)
        slope.addcmul_((sigma * x).sub_(2).mul_(rest), ratio.div(length), value=-1)
        x = x.sub_(value.div_(slope.mul_(square).clamp_min_(info.tiny))).clamp_(0.0, 1.0)
    rest, norm = _norms(x, square * x, sigma)
    strength = torch.lerp(ratio, rest.mul_(norm.rsqrt_()), jumps)
    return strength.div_(y1.clamp_min(info.smallest_normal * info.eps))


def _norms(x: Tensor, bend: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """1 - w3^2, and (1 - a w3)^2 + (a - w3)^2 for w3 = a x, a = y2 / y1; ``bend`` is a^2 x."""
    square = bend * x
    return 1 - square, (square + 1).mul_(sigma).sub_(bend, alpha=4).clamp_min_(1e-30)
