"""The strength at which a group becomes 2:4: the equations of ``prox/critical.py`` as a Triton kernel, in float32."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.arguments import SIZES, Layout, Strides, Tensors, Variant
from prox24_lightning.prox.triton.memory import coordinates, larger, load_groups, scaled, smaller

_TINY = tl.constexpr(2.0**-126)
_STEPS = tl.constexpr(3)


@triton.jit(do_not_specialize=SIZES)
def critical_kernel(
    weight,
    scale,
    result,
    groups,
    length,
    inner,
    scale_before,
    scale_along,
    scale_behind,
    HAS_SCALE: tl.constexpr,
    LAST_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The critical strength of every group of one weight."""
    begin = tl.program_id(0) * BLOCK
    group = tl.arange(0, BLOCK)
    inside = group < groups - begin
    tensors = Tensors(weight, weight, 0.0, scale, scale, scale, scale, None)
    strides = Strides(scale_before, scale_along, scale_behind)
    layout = Layout(length, inner, strides, strides)
    variant: tl.constexpr = Variant(
        one_strength=True,
        has_scale=HAS_SCALE,
        last_dim=LAST_DIM,
        wide=WIDE,
        settle=False,
        pairs=False,
        vectors=False,
        statistics=False,
    )
    found = critical_strengths(tensors, layout, begin, group, inside, variant)
    tl.store(result + begin.to(tl.int64) + group, found, mask=inside)


@triton.jit
def critical_strengths(tensors, layout, begin, group, inside, VARIANT: tl.constexpr):
    """The critical strength of each group; see :func:`~prox24_lightning.prox.critical_strength_24`."""
    x0, x1, x2, x3 = load_groups(tensors.source, layout, begin, group, inside, VARIANT)
    _, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
    y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
    high0, low0, high1, low1 = larger(y0, y2), smaller(y0, y2), larger(y1, y3), smaller(y1, y3)
    first, middle0, middle1 = larger(high0, high1), smaller(high0, high1), larger(low0, low1)
    second, third = larger(middle0, middle1), smaller(middle0, middle1)
    root = _share(second, first)
    square, ratio = root * root, _share(third, second)
    sigma = square + 1
    depth = ratio * ratio - (1 - ratio * ratio) / tl.maximum(square, _TINY)
    jumps = depth > 0
    depth = tl.minimum(tl.maximum(depth, 0.0), 1.0)
    x = ((0.04009 * square - 0.3607) * square + 0.40589) * depth + (0.10643 * square + 0.23964) * square - 0.24518
    x = (x * depth + 0.18269 * square + 0.32008) * depth
    for _ in tl.static_range(_STEPS):
        rest, norm = _norms(x, square, sigma)
        pull = ratio * tl.sqrt(norm)
        value = 1 - pull * rest + square * x * x * (sigma * x - 3)
        slope = x * (3 * sigma * x - 6 + 2 * pull) - ratio * ((sigma * x - 2) * rest) / tl.sqrt(norm)
        x = tl.minimum(tl.maximum(x - value / _away(slope * square), 0.0), 1.0)
    rest, norm = _norms(x, square, sigma)
    strength = tl.where(jumps, rest * tl.rsqrt(norm), ratio) / first
    return tl.where(first == 0, 0.0, tl.where(first == first, strength, float("nan")))


@triton.jit
def _share(part, whole):
    """``part / whole``; 0 for 0/0 and inf/inf."""
    quotient = part / whole
    return tl.where(quotient == quotient, quotient, 0.0)


@triton.jit
def _norms(x, square, sigma):
    """1 - w3^2, and (1 - a w3)^2 + (a - w3)^2 for w3 = a x, where ``square`` is a^2."""
    bend = square * x
    return 1 - bend * x, tl.maximum((bend * x + 1) * sigma - 4 * bend, 1e-30)


@triton.jit
def _away(x):
    return tl.maximum(x, _TINY)
