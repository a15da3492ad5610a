"""Groups on which the objective is convex, or that can end in one way only, in float32: a Newton iteration on pair sums.

For a pair with sum ``A = W3 + W4`` (or ``W3`` alone) and one with ``B = W1 + W2`` the differences follow in closed form,
``W1 - W2 = (v1 - v2) / (1 - A)`` and ``W3 - W4 = (v3 - v4) / (1 - B)``; DERIVATION.md has the equations.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton_roots import PRUNED, reciprocal

_STEPS = tl.constexpr(3)
"""Steps beyond the second at most."""
_FINISHED = tl.constexpr(0.012)


@triton.jit
def shrink_convex(v1, v2, v3, v4, active):
    """How much each sorted entry shrinks, in lambda units; PRUNED for a fourth entry that goes."""
    high, low, last = v1 + v2, v1 - v2, v3 - v4
    gap1, gap2 = v1 - v3, v2 - v3
    wide, c = 1 + gap1 + gap2, v3 - gap1 * gap2
    a = c * wide * reciprocal(wide * wide + c)
    b = high - high * (a * (1 - a))
    dense = tl.zeros_like(v1)
    a, b, dense, change = _newton(a, b, dense, high, low, last, v3, v4)
    a, b, dense, change = _newton(a, b, dense, high, low, last, v3, v4)
    left = tl.full((), _STEPS, tl.int32)
    going = active & (change > _FINISHED)
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (left > 0):
        a_, b_, dense_, change = _newton(a, b, dense, high, low, last, v3, v4)
        # A group ends with the same answer whatever its neighbours in the warp need.
        a, b, dense = tl.where(going, a_, a), tl.where(going, b_, b), tl.where(going, dense_, dense)
        going = going & (change > _FINISHED)
        left -= 1
    difference = last * reciprocal(tl.maximum(1 - b, 0.02))
    four = (dense > 0) & (difference < a)
    difference = tl.where(four, difference, a)
    across = low * reciprocal(1 - a)
    w1, w2 = 0.5 * (b + across), 0.5 * (b - across)
    w3, w4 = 0.5 * (a + difference), 0.5 * (a - difference)
    product, tail = w1 * w2, w3 * w4
    s4 = tl.where(four, product + b * w3, PRUNED)
    return w2 * a + tail, w1 * a + tail, product + b * w4, s4


@triton.jit
def _newton(a, b, dense, high, low, last, v3, v4):
    """One step; ``dense`` is 1.0 where the fourth entry stays, decided anew from its own stationarity."""
    p, q = reciprocal(1 - a), reciprocal(tl.maximum(1 - b, 0.02))
    across, along = low * p, last * q
    square = across * across
    double = b * b - square
    w3 = a + (0.5 * dense) * (along - a)
    stays = v4 > 0.25 * double + w3 * b
    a = tl.where(stays, a, w3)
    dense = tl.where(stays, 1.0, 0.0)
    inner = dense * (along * along)
    both = dense * a
    f1 = b + (a * b - high) + 0.5 * (both * a - inner)
    rate = 2 + dense * (b - 1)
    f2 = rate * a - (2 * v3 - dense * last) + 0.5 * double
    j11, j22, j12 = rate - square * p, 1 + a - inner * q, b + both
    inverse = reciprocal(tl.maximum(j11 * j22 - j12 * j12, 1e-3))
    da, db = (j22 * f2 - j12 * f1) * inverse, (j11 * f1 - j12 * f2) * inverse
    return tl.minimum(tl.maximum(a - da, 0.0), 0.95), b - db, dense, tl.abs(da) + tl.abs(db)
