"""What happens to a group of four: it is settled by cheap tests, or by one of two kinds of equations.

``triton_convex.py`` solves the simple groups, ``triton_roots.py`` the others.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.bf16_pairs import largest_three, smallest, without_smaller
from prox24_lightning.prox.triton.memory import as_words, coordinates, entries_of, larger, scaled, smaller
from prox24_lightning.prox.triton.newton import shrink_convex
from prox24_lightning.prox.triton.roots import PRUNED, half_beyond_one, reciprocal, shrink_sorted

_STEEP = tl.constexpr((4 / 3) ** 0.5)


@triton.jit
def settle(words, tensors, shape, begin, group, inside, KIND: tl.constexpr):
    """Prune the groups that keep two entries (at strength 0 all), leave the others as they are; which wait, and their
    three largest entries and strengths."""
    lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
    if KIND[5] and not KIND[1]:
        first, second, third = largest_three(words)
    else:
        x0, x1, x2, x3 = entries_of(words, KIND)
        y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, KIND)
        high0, high1 = larger(y0, y2), larger(y1, y3)
        middle0, middle1 = smaller(high0, high1), larger(smaller(y0, y2), smaller(y1, y3))
        first, second, third = larger(high0, high1), larger(middle0, middle1), smaller(middle0, middle1)
    # Two equal entries of which one goes are told apart by position, which the solvers do; zeros need not be.
    tiniest = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)
    settled = _ends_with_two(first, second, third, lam) & (tl.maximum(second, tiniest) > third)
    least = tl.where(settled, second, 0.0)
    if not KIND[0]:
        unchanged = (lam == 0) & (first >= 0)
        settled = settled | unchanged
        least = tl.where(unchanged, 0.0, least)
    # A group that waits is written too: in place nothing changes, and memory gets whole sectors. What goes is finite,
    # and the sum leaves all but -0.0 as it is.
    if KIND[5] and not KIND[1]:
        kept = without_smaller(words, least)
    else:
        r0, r1 = x0 * tl.where(y0 < least, 0.0, 1.0) + 0.0, x1 * tl.where(y1 < least, 0.0, 1.0) + 0.0
        r2, r3 = x2 * tl.where(y2 < least, 0.0, 1.0) + 0.0, x3 * tl.where(y3 < least, 0.0, 1.0) + 0.0
        kept = as_words((r0, r1, r2, r3), KIND)
    return kept, settled == 0, (first, second, third, lam)


@triton.jit
def _ends_with_two(first, second, third, lam):
    """Sufficient, and where ``v1^2 + v2^2 <= 1`` necessary as well; false for NaN."""
    v1, v2, steep = lam * first, lam * second, (lam * _STEEP) * third
    square = v1 * v1 + v2 * v2
    # The factor is max(1, (1 + square) / 2); from square = 3 on, where it stays at 2, the first test holds anyway.
    return (square >= 1 + steep * steep) | (third + third * half_beyond_one(square) <= v1 * second)


@triton.jit
def are_simple(words, largest, c0, c1, c2, c3, KIND: tl.constexpr):
    """Whether the objective is convex on the box, or no dense point exists and the third entry appears continuously;
    and float32 can tell the entries apart in sums. And the fourth entries."""
    first, second, third, lam = largest
    if KIND[5] and not KIND[1]:
        fourth = smallest(words)
    else:
        x0, x1, x2, x3 = entries_of(words, KIND)
        y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, KIND)
        fourth = smaller(smaller(y0, y2), smaller(y1, y3))
    v1, v2, v3, v4 = lam * first, lam * second, lam * third, lam * fourth
    d1, d2, d3 = v1 - v4, v2 - v4, v3 - v4
    alone = (v1 * v1 + v2 * v2 <= 0.9) & (v4 <= d1 * d2 + (d1 + d2) * d3)
    convex = (v1 + v2 + v3 <= 1) & (v1 + v2 <= 0.96)
    return (third > fourth) & (v3 >= 3e-3 * v1 + 1e-14) & (convex | alone), fourth


@triton.jit
def may_change(largest):
    """Whether a group that waits may end with two entries that it does not have yet, or is a tie."""
    first, second, third, lam = largest
    v1, v2 = lam * first, lam * second
    # Only a tie waits with square <= 1 and two entries.
    return ((v1 * v1 + v2 * v2 <= 1) == 0) | _ends_with_two(first, second, third, lam)


@triton.jit
def simple(words, ordered, lam, c0, c1, c2, c3, active, KIND: tl.constexpr):
    """Simple groups; ``ordered`` are the magnitudes of each in descending order, or None."""
    x0, x1, x2, x3 = entries_of(words, KIND)
    y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, KIND)
    s0, s1, s2, s3 = _shrink_simple(y0, y1, y2, y3, ordered, lam, active)
    if KIND[1]:
        s0, s1, s2, s3 = s0 / c0, s1 / c1, s2 / c2, s3 / c3
    return as_words((_moved(x0, s0), _moved(x1, s1), _moved(x2, s2), _moved(x3, s3)), KIND)


@triton.jit
def _moved(x, shrink):
    """``x`` moved towards zero by ``shrink``, and to +0.0 at most."""
    shift = tl.minimum(shrink, tl.abs(x)).to(tl.uint32, bitcast=True) | (x.to(tl.uint32, bitcast=True) & 0x80000000)
    return x - shift.to(tl.float32, bitcast=True)


@triton.jit
def other(words, lam, c0, c1, c2, c3, root, KIND: tl.constexpr, DENSE: tl.constexpr):
    """Any groups; where a dense point is still to be compared with, and what is then needed as ``root``, with
    ``DENSE``."""
    x0, x1, x2, x3 = entries_of(words, KIND)
    y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, KIND)
    s0, s1, s2, s3, left, root = _shrink_other(y0, y1, y2, y3, lam, root, KIND, DENSE)
    if KIND[1]:
        s0, s1, s2, s3 = s0 / c0, s1 / c1, s2 / c2, s3 / c3
    # A NaN goes to the whole group.
    total = y0 + y1 + y2 + y3 + lam
    sound = total == total
    zero = tl.where(sound, 0.0, float("nan"))
    w0, w1, w2, w3 = _shrunk(x0, s0, zero), _shrunk(x1, s1, zero), _shrunk(x2, s2, zero), _shrunk(x3, s3, zero)
    return as_words((w0, w1, w2, w3), KIND), left & sound, root


@triton.jit
def _shrunk(x, shrink, zero):
    """As ``_moved``, for entries that may be infinite or pruned from infinity; NaN where ``zero`` is."""
    kept = tl.maximum(tl.abs(x) - shrink, 0.0).to(tl.uint32, bitcast=True)
    return (kept | (x.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True) + zero


@triton.jit
def _exchange(swap, a, b):
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit
def _shrink_simple(y0, y1, y2, y3, ordered, lam, inside):
    """Sort, solve, and undo the sorting. Equal entries are treated alike, so their order does not matter."""
    a0, a2, a1, a3 = larger(y0, y2), smaller(y0, y2), larger(y1, y3), smaller(y1, y3)
    b1, b2 = smaller(a0, a1), larger(a2, a3)
    if ordered is None:
        ordered = (larger(a0, a1), larger(b1, b2), smaller(b1, b2), smaller(a2, a3))
    first, second, third, fourth = ordered
    swap02, swap13, swap01, swap23, swap12 = y0 < y2, y1 < y3, a0 < a1, a2 < a3, b1 < b2
    s0, s1, s2, s3 = shrink_convex(lam * first, lam * second, lam * third, lam * fourth, inside)
    inverse = 0.25 * tl.minimum(reciprocal(lam), 3e38)
    s0, s1, s2, s3 = s0 * inverse, s1 * inverse, s2 * inverse, s3 * inverse
    s1, s2 = _exchange(swap12, s1, s2)
    s0, s1 = _exchange(swap01, s0, s1)
    s2, s3 = _exchange(swap23, s2, s3)
    s0, s2 = _exchange(swap02, s0, s2)
    s1, s3 = _exchange(swap13, s1, s3)
    return s0, s1, s2, s3


@triton.jit
def _shrink_other(y0, y1, y2, y3, lam, root, KIND: tl.constexpr, DENSE: tl.constexpr):
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
    s0, s1, s2, s3, left, root = shrink_sorted(y0, y1, y2, y3, lam, root, DENSE)
    if KIND[4]:
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
