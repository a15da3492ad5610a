"""Solve groups of four: simple ones by ``newton.py``, any others by ``roots.py``."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.memory import as_words, entries_of, larger, scaled, smaller
from prox24_lightning.prox.triton.newton import shrink_convex
from prox24_lightning.prox.triton.roots import PRUNED, reciprocal, shrink_sorted


@triton.jit
def solve_simple(words, ordered, strength, c0, c1, c2, c3, active, VARIANT: tl.constexpr):
    """Return the prox of simple groups; ``ordered`` are the magnitudes of each in descending order, or None."""
    x0, x1, x2, x3 = entries_of(words, VARIANT)
    y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
    s0, s1, s2, s3 = _shrink_simple(y0, y1, y2, y3, ordered, strength, active)
    if VARIANT.has_scale:
        s0, s1, s2, s3 = s0 / c0, s1 / c1, s2 / c2, s3 / c3
    return as_words((_moved(x0, s0), _moved(x1, s1), _moved(x2, s2), _moved(x3, s3)), VARIANT)


@triton.jit
def _moved(x, shrink):
    """``x`` moved towards zero by ``shrink``, and to +0.0 at most."""
    shift = tl.minimum(shrink, tl.abs(x)).to(tl.uint32, bitcast=True) | (x.to(tl.uint32, bitcast=True) & 0x80000000)
    return x - shift.to(tl.float32, bitcast=True)


@triton.jit
def solve_general(words, strength, c0, c1, c2, c3, root, VARIANT: tl.constexpr, DENSE: tl.constexpr):
    """Return the prox of any groups, without dense points; where a dense point is still possible; and the root of the
    3-sparse equation. With ``DENSE`` dense points are compared too, and ``root`` is that root."""
    x0, x1, x2, x3 = entries_of(words, VARIANT)
    y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
    s0, s1, s2, s3, left, root = _shrink_general(y0, y1, y2, y3, strength, root, VARIANT, DENSE)
    if VARIANT.has_scale:
        s0, s1, s2, s3 = s0 / c0, s1 / c1, s2 / c2, s3 / c3
    # A NaN goes to the whole group.
    total = y0 + y1 + y2 + y3 + strength
    sound = total == total
    zero = tl.where(sound, 0.0, float("nan"))
    w0, w1, w2, w3 = _shrunk(x0, s0, zero), _shrunk(x1, s1, zero), _shrunk(x2, s2, zero), _shrunk(x3, s3, zero)
    return as_words((w0, w1, w2, w3), VARIANT), left & sound, root


@triton.jit
def _shrunk(x, shrink, zero):
    """As ``_moved``, for entries that may be infinite or pruned from infinity; NaN where ``zero`` is."""
    kept = tl.maximum(tl.abs(x) - shrink, 0.0).to(tl.uint32, bitcast=True)
    return (kept | (x.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True) + zero


@triton.jit
def _exchange(swap, a, b):
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit
def _shrink_simple(y0, y1, y2, y3, ordered, strength, inside):
    """Sort, solve, and undo the sorting. Equal entries are treated alike, so their order does not matter."""
    a0, a2, a1, a3 = larger(y0, y2), smaller(y0, y2), larger(y1, y3), smaller(y1, y3)
    b1, b2 = smaller(a0, a1), larger(a2, a3)
    if ordered is None:
        ordered = (larger(a0, a1), larger(b1, b2), smaller(b1, b2), smaller(a2, a3))
    first, second, third, fourth = ordered
    swap02, swap13, swap01, swap23, swap12 = y0 < y2, y1 < y3, a0 < a1, a2 < a3, b1 < b2
    s0, s1, s2, s3 = shrink_convex(strength * first, strength * second, strength * third, strength * fourth, inside)
    inverse = 0.25 * tl.minimum(reciprocal(strength), 3e38)
    s0, s1, s2, s3 = s0 * inverse, s1 * inverse, s2 * inverse, s3 * inverse
    s1, s2 = _exchange(swap12, s1, s2)
    s0, s1 = _exchange(swap01, s0, s1)
    s2, s3 = _exchange(swap23, s2, s3)
    s0, s2 = _exchange(swap02, s0, s2)
    s1, s3 = _exchange(swap13, s1, s3)
    return s0, s1, s2, s3


@triton.jit
def _shrink_general(y0, y1, y2, y3, strength, root, VARIANT: tl.constexpr, DENSE: tl.constexpr):
    """Any groups without NaN. Neighbours change places while the later one is larger: so among equals the earlier
    position stays the larger."""
    first01 = y0 < y1
    y0, y1 = _exchange(first01, y0, y1)
    first12 = y1 < y2
    y1, y2 = _exchange(first12, y1, y2)
    first23 = y2 < y3
    y2, y3 = _exchange(first23, y2, y3)
    second01 = y0 < y1
    y0, y1 = _exchange(second01, y0, y1)
    second12 = y1 < y2
    y1, y2 = _exchange(second12, y1, y2)
    third01 = y0 < y1
    y0, y1 = _exchange(third01, y0, y1)
    s0, s1, s2, s3, left, root = shrink_sorted(y0, y1, y2, y3, strength, root, DENSE)
    if VARIANT.settle:
        whole = s2 < PRUNED
        s0, s1, s2, s3 = (
            tl.where(whole, 0.0, s0),
            tl.where(whole, 0.0, s1),
            tl.where(whole, 0.0, s2),
            tl.where(whole, 0.0, s3),
        )
    s0, s1 = _exchange(third01, s0, s1)
    s1, s2 = _exchange(second12, s1, s2)
    s0, s1 = _exchange(second01, s0, s1)
    s2, s3 = _exchange(first23, s2, s3)
    s1, s2 = _exchange(first12, s1, s2)
    s0, s1 = _exchange(first01, s0, s1)
    return s0, s1, s2, s3, left, root
