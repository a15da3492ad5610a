"""The equations of ``roots.py`` and the choice between them as Triton device functions, in float32.

Divisions and roots are the hardware's approximate instructions, to about 1e-7.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.interpreter import INTERPRETED

ALWAYS_TWO = tl.constexpr((1 + 2**0.5) / 2)
PRUNED = tl.constexpr(float("inf"))
"""How much a pruned entry "shrinks"."""
_CAP = tl.constexpr(4.0)
_TINY = tl.constexpr(1e-30)
_FLAT = tl.constexpr(1e-9)
"""Squares of slopes below this may be rounding, next to a singular Hessian: steps are as short as if they were this."""
_THREE_SPARSE_STEPS = tl.constexpr(2)
_DENSE_STEPS = tl.constexpr(3)


@triton.jit
def shrink_sorted(y1, y2, y3, y4, strength, u, DENSE: tl.constexpr):
    """How much each sorted entry shrinks, PRUNED for those that go; where a dense point was left out that may be
    better; and the root of the 3-sparse equation. With ``DENSE`` that root is ``u``, and the dense point is found."""
    part = strength * (1 / _CAP)
    v1, v2, v3, v4 = _capped(y1, part), _capped(y2, part), _capped(y3, part), _capped(y4, part)
    square = v1 * v1 + v2 * v2
    two = (v1 >= ALWAYS_TWO) | (square >= 1 + 4 / 3 * v3 * v3) | (y3 * tl.maximum(1.0, (1 + square) / 2) <= v1 * y2)
    unsettled = (two == 0) | (strength == 0)
    if not DENSE:
        u = _three_sparse(v1, v2, v3)
    w1, w2, gain3 = _pair(u, v1, v2, v3)
    three = ((gain3 < 0) | (square <= 1)) & unsettled
    sure = ((y4 >= v1 * y2 + v2 * y3 + v3 * y1) & (y4 > 0)) | (strength == 0)
    convex = v1 + v2 + v3 <= 1
    d1, d2, d3 = v1 - v4, v2 - v4, v3 - v4
    w3, w4 = u, tl.zeros_like(u)
    if DENSE:
        p1, p2, p3, p4, gain4 = _dense(v1, v2, v3, v4, d1, d2, d3)
        four = sure | convex | ((p4 > 0) & (gain4 < gain3))
        left = four
        w1, w2 = tl.where(four, p1, w1), tl.where(four, p2, w2)
        w3, w4 = tl.where(four, p3, w3), tl.where(four, p4, w4)
        three = three | four
    else:
        l1, l2, l3 = _least(d1, d2, d3, d1, d2, d3)
        l1, l2, l3 = _least(d1, d2, d3, l1, l2, l3)
        bound = tl.where(convex, w1 * w2 + (w1 + w2) * u, l1 * l2 + l2 * l3 + l3 * l1)
        four = tl.zeros_like(three)
        left = (sure | ((v4 > bound) & three)) & unsettled
    inverse = tl.minimum(1 / tl.where(strength > 0, strength, 1.0), 3e38)
    pair, product = w3 + w4, w3 * w4
    s1 = tl.where(three, _over(w2 * pair + product, inverse), 0.0)
    s2 = tl.where(three, _over(w1 * pair + product, inverse), 0.0)
    s3 = tl.where(three, _over(w1 * w2 + (w1 + w2) * w4, inverse), PRUNED)
    s4 = tl.where(four, _over(w1 * w2 + (w1 + w2) * w3, inverse), PRUNED)
    return s1, s2, s3, s4, left, u


@triton.jit
def _least(d1, d2, d3, l1, l2, l3):
    """Better lower bounds on what the three largest entries of a dense point are above the fourth, from such bounds."""
    return (
        d1 * reciprocal(tl.maximum(1 - l2 - l3, 1e-3)),
        d2 * reciprocal(tl.maximum(1 - l1 - l3, 1e-3)),
        d3 * reciprocal(tl.maximum(1 - l1 - l2, 1e-3)),
    )


@triton.jit
def _over(e2, inverse):
    return tl.maximum(e2, 0.0) * inverse


@triton.jit
def _capped(y, part):
    """``_CAP * part * y``, at most ``_CAP``; 0 for NaN."""
    if INTERPRETED:
        v = part * y
        return tl.where(v == v, tl.minimum(v, 1.0), 0.0) * _CAP  # a constant on the left would stay one
    return _CAP * tl.inline_asm_elementwise(
        "mul.sat.f32 $0, $1, $2;", "=f,f,f", [y, part], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, to 1e-7; 0 for x beyond 1e38."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _inverse_sqrt(x):
    if INTERPRETED:
        return tl.rsqrt(x)
    return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def square_root(x):
    if INTERPRETED:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def saturated(x, y):
    """``x - y`` between 0 and 1, in one instruction; 0 for NaN."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(x - y, 0.0), 1.0)
    return tl.inline_asm_elementwise("sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)


@triton.jit
def half_beyond_one(x):
    """``(x - 1) / 2`` between 0 and 1."""
    return saturated(0.5 * x, 0.5)


@triton.jit
def _halley_step(value, slope, half_curve):
    square = slope * slope
    return value * slope * reciprocal(tl.maximum(tl.maximum(square - value * half_curve, square * 0.5), _FLAT))


@triton.jit
def _three_sparse(v1, v2, v3):
    """The root of the equation of a 3-sparse point, if there is one; DERIVATION.md says where the steps start."""
    product = v1 * v2
    excess, room = v3 - product, 1 - v1 * v1 - v2 * v2
    bend = product * (4.8 - 1.4 * v3)
    root = square_root(tl.maximum(room * room + 2 * bend * excess, _TINY))
    jumps = room < 0
    u = tl.where(jumps, root - room, 2 * excess) * reciprocal(tl.where(jumps, bend, room + root))
    u = tl.maximum(tl.minimum(u, 0.75), 0.0)
    for _ in tl.static_range(_THREE_SPARSE_STEPS):
        u = _three_sparse_step(u, v1, v2, v3)
    return u


@triton.jit
def _pair(u, v1, v2, v3):
    """The other two entries of a 3-sparse point, and its objective less that of two entries; 0 for no gain."""
    inverse = reciprocal(1 - u * u)
    w1, w2 = (v1 - u * v2) * inverse, (v2 - u * v1) * inverse
    norm = w1 * w1 + w2 * w2 - 1
    gain = u * ((u - v3) + w1 * w2 + u / 2 * norm)
    return w1, w2, tl.where((norm < 0) & (w2 > 0), gain, 0.0)


@triton.jit
def _three_sparse_step(u, v1, v2, v3):
    inverse = reciprocal(1 - u * u)
    w1, w2 = (v1 - u * v2) * inverse, (v2 - u * v1) * inverse
    across1, across2 = w1 - u * w2, w2 - u * w1
    value = (u - v3) + w1 * w2
    slope = 1 - (w1 * across1 + w2 * across2) * inverse
    change = _halley_step(value, slope, 3 * inverse * inverse * across1 * across2)
    return tl.maximum(tl.minimum(u - change, 0.75), 0.0)


@triton.jit
def _split(t, k, inverse):
    x4 = (t + 0.5 - (k - 0.25) * inverse) * 0.5
    return x4, (k + t * (t + 1)) * inverse


@triton.jit
def _inverse_root(d, square):
    return _inverse_sqrt(tl.maximum(d + square, 1e-15))


@triton.jit
def _dense_step(t, upper, k, d1, d2, d3):
    inverse = reciprocal(t + 0.5)
    x4, total = _split(t, k, inverse)
    square, size = x4 * x4, tl.abs(x4)
    i1, i2, i3 = _inverse_root(d1, square), _inverse_root(d2, square), _inverse_root(d3, square)
    value = d1 * reciprocal((d1 + square) * i1 + size + _TINY) + d2 * reciprocal((d2 + square) * i2 + size + _TINY)
    value += d3 * reciprocal((d3 + square) * i3 + size + _TINY) + 6 * tl.maximum(-x4, 0.0) + 4 * t - total
    spread = 1 + x4 * (i1 + i2 + i3)
    rate = total * inverse * 0.5
    slope = 2 * x4 * inverse + rate * spread
    bend = d1 * i1 * i1 * i1 + d2 * i2 * i2 * i2 + d3 * i3 * i3 * i3
    curve = (k - 0.25) * inverse * inverse * inverse * (2 - spread) + rate * rate * bend
    return tl.minimum(tl.maximum(t - _halley_step(value, slope, curve * 0.5), 0.0), upper)


@triton.jit
def _dense(v1, v2, v3, v4, d1, d2, d3):
    b = 1 + 2 * (d1 + d2 + d3)
    c = tl.maximum(v4 - (d1 * d2 + d2 * d3 + d3 * d1), 0.0)
    upper = 2 * c * reciprocal(b + square_root(b * b + 12 * c))
    k = (v1 + v2 + v3 - v4) / 2
    t = 0.8 * upper
    for _ in tl.static_range(_DENSE_STEPS):
        t = _dense_step(t, upper, k, d1, d2, d3)
    inverse = reciprocal(t + 0.5)
    x4, total = _split(t, k, inverse)
    square, size = x4 * x4, tl.abs(x4)
    i1, i2, i3 = _inverse_root(d1, square), _inverse_root(d2, square), _inverse_root(d3, square)
    base, rate = t + 2 * tl.maximum(-x4, 0.0), total * inverse * 0.5
    w1 = base + d1 * reciprocal((d1 + square) * i1 + size + _TINY)
    w2 = base + d2 * reciprocal((d2 + square) * i2 + size + _TINY)
    w3 = base + d3 * reciprocal((d3 + square) * i3 + size + _TINY)
    # One Newton step on the stationarity of w4 itself, away from the jumps; g is the derivative of w by w4.
    g1, g2, g3 = 1 + rate * (x4 * i1 - 1), 1 + rate * (x4 * i2 - 1), 1 + rate * (x4 * i3 - 1)
    slope = 1 + (w2 + w3) * g1 + (w1 + w3) * g2 + (w1 + w2) * g3
    residual = (t - v4) + w1 * w2 + (w1 + w2) * w3
    after = tl.maximum(t - residual * reciprocal(tl.maximum(slope, 0.05)), t * 1e-3)
    change = tl.where((v1 + v2 + v3 <= 0.9) | (slope >= 0.5), after - t, 0.0)
    w1, w2, w3, t = w1 + g1 * change, w2 + g2 * change, w3 + g3 * change, t + change
    gain = ((w1 - v1) * (w1 - v1) + (w2 - v2) * (w2 - v2) + w3 * w3 + t * t) / 2
    gain += (w3 + t) * w1 * w2 + w3 * t * (w1 + w2) - v3 * w3 - v4 * t
    return w1, w2, w3, t, gain
