"""Statistics of a weight, group by group: sums, counts of zeros, and the mask that it would get now."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prox24_lightning.prox.triton.arguments import SUMS
from prox24_lightning.prox.triton.memory import coordinates, entries_of, scaled


class Sums(NamedTuple):
    """Sums over groups, in the order of :class:`~prox24_lightning.prox.statistics.ProxStatistics`; one a lane."""

    squares: Any
    scaled_squares: Any
    pruned_squares: Any
    penalty: Any
    zeros_0: Any
    zeros_1: Any
    zeros_2: Any
    zeros_3: Any
    zeros_4: Any
    flips: Any


@triton.jit
def zero_sums(SIZE: tl.constexpr):
    """The sums over no groups."""
    zero = tl.zeros([SIZE], tl.float32)
    return Sums(zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def accumulate(sums, x0, x1, x2, x3, c0, c1, c2, c3, inside, VARIANT: tl.constexpr):
    """The sums with these groups, without their flips, and for each a byte whose bit i is set if entry i is one of its
    two largest."""
    squares, metric, lost, penalty, z0, z1, z2, z3, z4, flips = sums
    x0, x1, x2, x3 = _inside(inside, x0), _inside(inside, x1), _inside(inside, x2), _inside(inside, x3)
    squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
    zeros = (x0 == 0).to(tl.int32) + (x1 == 0).to(tl.int32) + (x2 == 0).to(tl.int32) + (x3 == 0).to(tl.int32)
    zeros = tl.where(inside, zeros, 5)
    z0 += tl.where(zeros == 0, 1.0, 0.0)
    z1 += tl.where(zeros == 1, 1.0, 0.0)
    z2 += tl.where(zeros == 2, 1.0, 0.0)
    z3 += tl.where(zeros == 3, 1.0, 0.0)
    z4 += tl.where(zeros == 4, 1.0, 0.0)
    a, b, c, d = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
    penalty += a * b * (c + d) + c * d * (a + b)
    a, b, c, d = a * a, b * b, c * c, d * d
    metric += a + b + c + d
    high0, low0, high1, low1 = tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d)
    lost += tl.minimum(low0, low1) + tl.minimum(tl.minimum(high0, high1), tl.maximum(low0, low1))
    # Bit i where fewer than two others beat entry i; among equals the earlier one wins.
    b0, b1, b2 = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
    b3, b4, b5 = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    bits = tl.where(b0 + b1 + b2 < 2, 1, 0) + tl.where(1 - b0 + b3 + b4 < 2, 2, 0)
    bits += tl.where(2 - b1 - b3 + b5 < 2, 4, 0) + tl.where(3 - b2 - b4 - b5 < 2, 8, 0)
    return Sums(squares, metric, lost, penalty, z0, z1, z2, z3, z4, flips), bits


@triton.jit
def accumulate_results(sums, tensors, layout, begin, group, inside, words, VARIANT: tl.constexpr):
    """As :func:`accumulate`, for results of the prox, rounded as memory holds them; write the bytes, and count the
    flips against those of the last statistics."""
    kind = tensors.target.dtype.element_ty
    x0, x1, x2, x3 = entries_of(words, VARIANT)
    x0, x1 = x0.to(kind).to(tl.float32), x1.to(kind).to(tl.float32)
    x2, x3 = x2.to(kind).to(tl.float32), x3.to(kind).to(tl.float32)
    _, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
    sums, bits = accumulate(sums, x0, x1, x2, x3, c0, c1, c2, c3, inside, VARIANT)
    tl.store(tensors.code + begin + group, bits.to(tl.uint8), mask=inside)
    before = tl.load(tensors.previous_code + begin + group, mask=inside, other=0).to(tl.int32)
    changed = before ^ tl.where(inside, bits, 0)
    flips = (changed & 1) + ((changed >> 1) & 1) + ((changed >> 2) & 1) + (changed >> 3)
    squares, metric, lost, penalty, z0, z1, z2, z3, z4, flipped = sums
    return Sums(squares, metric, lost, penalty, z0, z1, z2, z3, z4, flipped + flips.to(tl.float32))


@triton.jit
def add_sums(place, sums):
    """Add the sums over all groups to those in memory."""
    for number in tl.static_range(SUMS):
        tl.atomic_add(place + number, tl.sum(sums[number], axis=0), sem="relaxed")


@triton.jit
def _inside(inside, x):
    return tl.where(inside, x, 0.0)
