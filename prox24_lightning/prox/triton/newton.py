"""Groups whose objective is convex, or that can end in one way only, in float32: Newton's iteration on pair sums.

Given the sums ``A = W3 + W4`` (or ``W3`` alone) and ``B = W1 + W2`` the differences follow in closed form,
``W1 - W2 = (v1 - v2) / (1 - A)`` and ``W3 - W4 = (v3 - v4) / (1 - B)``; DERIVATION.md has the equations.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.roots import PRUNED, reciprocal, saturated, square_root

_STEPS = tl.constexpr(5)
"""Steps beyond the first at most."""
_FINISHED = tl.constexpr(0.01)


@triton.jit
def shrink_convex(v1, v2, v3, v4, active):
    """How much each sorted entry shrinks, times 4, in lambda units; PRUNED for a fourth entry that goes."""
    high, low, last = v1 + v2, v1 - v2, v3 - v4
    a, b, dense = _start(v1, v2, v3, high, low, last)
    p, q, across, along = _differences(a, b, low, last, False)
    a, b, change = _newton(a, b, dense, p, q, across, along, high, last, v3)
    p, q, across, along = _differences(a, b, low, last, False)
    stays = _stays(a, b, dense, across, along, v4)
    going = active & ((change > _FINISHED) | (stays != (dense > 0)))
    left = tl.full((), _STEPS, tl.int32)
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (left > 0):
        p, q, across_, along_ = _differences(a, b, low, last, True)
        dense_ = tl.where(_stays(a, b, dense, across_, along_, v4), 1.0, 0.0)
        a_, b_, change = _newton(a, b, dense_, p, q, across_, along_, high, last, v3)
        # A group ends with the same answer whatever its neighbours in the warp need.
        a, b, dense = tl.where(going, a_, a), tl.where(going, b_, b), tl.where(going, dense_, dense)
        p, q, across_, along_ = _differences(a, b, low, last, True)
        across, along = tl.where(going, across_, across), tl.where(going, along_, along)
        going = going & ((change > _FINISHED) | (_stays(a, b, dense, across, along, v4) != (dense > 0)))
        left -= 1
    a = tl.maximum(a, 0.0)
    four = (dense > 0) & (along < a)
    along = tl.where(four, along, a)
    twice_a, twice_b = a + a, b + b
    w1, w2, w3, w4 = b + across, b - across, a + along, a - along  # twice the entries
    product, tail = w1 * w2, w3 * w4
    s4 = tl.where(four, product + twice_b * w3, PRUNED)
    return w2 * twice_a + tail, w1 * twice_a + tail, product + twice_b * w4, s4


@triton.jit
def _start(v1, v2, v3, high, low, last):
    """Both sums to about 0.005, and 1.0 for a dense point; DERIVATION.md says how."""
    product = v1 * v2
    excess = v3 - product
    room = 1 - v1 * v1 - v2 * v2
    curve = product * (10 - 2.8 * v3)
    u = 2 * excess * reciprocal(room + square_root(tl.maximum(room * room + curve * excess, 0.0)))
    dense = (u - last) * (1 + u) > u * high
    both = (2 * u - last) * (1 + u) * reciprocal(1 + u + high)
    along = last * (1 + both) * reciprocal(1 + both - high)
    tails = tl.where(dense, both * both - along * along, 0.0)
    a = tl.where(dense, both + (0.42 + 1.5 * low) * tails, u)
    return a, high * reciprocal(1 + a) - 0.5 * tails, tl.where(dense, 1.0, 0.0)


@triton.jit
def _differences(a, b, low, last, BOUNDED: tl.constexpr):
    """1 / (1 - a), 1 / (1 - b), and the differences in the upper and the lower pair; ``BOUNDED`` for any ``a``."""
    # 1 - a not below 0.05 and 1 - b not below 0.02, without comparisons, which are slower than sums.
    p = reciprocal(saturated(0.95, a) + 0.05 if BOUNDED else 1 - a)
    q = reciprocal(saturated(0.98, b) + 0.02)
    return p, q, low * p, last * q


@triton.jit
def _stays(a, b, dense, across, along, v4):
    """Whether the fourth entry is positive: of a dense iterate itself, of a sparse one by its stationarity."""
    wanted = v4 - 0.25 * (b * b - across * across) - a * b
    return wanted + dense * ((a - along) - wanted) > 0


@triton.jit
def _newton(a, b, dense, p, q, across, along, high, last, v3):
    """One step for both sums from these differences, and how far it goes; ``dense`` is 1.0 for four entries, or 0.0."""
    square = across * across
    inner = dense * (along * along)
    both = dense * a
    f1 = b + (a * b - high) + 0.5 * (both * a - inner)
    rate = 2 + dense * (b - 1)
    f2 = rate * a - (2 * v3 - dense * last) + 0.5 * (b * b - square)
    j11, j22, j12 = rate - square * p, 1 + a - inner * q, b + both
    inverse = reciprocal(tl.maximum(j11 * j22 - j12 * j12, 1e-3))
    da, db = (j22 * f2 - j12 * f1) * inverse, (j11 * f1 - j12 * f2) * inverse
    return a - da, b - db, tl.abs(da) + tl.abs(db)
