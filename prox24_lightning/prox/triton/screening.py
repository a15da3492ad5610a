"""Cheap tests that decide a group of four without an equation, or choose its solver (DERIVATION.md)."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prox24_lightning.prox.triton.bf16_pairs import largest_three, smallest, without_smaller
from prox24_lightning.prox.triton.memory import as_words, coordinates, entries_of, larger, scaled, smaller
from prox24_lightning.prox.triton.roots import half_beyond_one

_STEEP = tl.constexpr((4 / 3) ** 0.5)


class Largest(NamedTuple):
    """The three largest magnitudes of each group, scaled, and its strength."""

    first: Any
    second: Any
    third: Any
    strength: Any


@triton.jit
def screen(words, tensors, layout, begin, group, inside, VARIANT: tl.constexpr):
    """Prune the groups that end with two entries (at strength 0 none), and leave the others as they are.

    Returns:
        the words, which groups wait for an equation, and the :class:`Largest` of each.
    """
    strength, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
    if VARIANT.pairs and not VARIANT.has_scale:
        first, second, third = largest_three(words)
    else:
        x0, x1, x2, x3 = entries_of(words, VARIANT)
        y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
        high0, high1 = larger(y0, y2), larger(y1, y3)
        middle0, middle1 = smaller(high0, high1), larger(smaller(y0, y2), smaller(y1, y3))
        first, second, third = larger(high0, high1), larger(middle0, middle1), smaller(middle0, middle1)
    # Of two equal entries the solvers drop one by its position; zeros need no such rule.
    tiniest = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)
    screened = _ends_with_two(first, second, third, strength) & (tl.maximum(second, tiniest) > third)
    least = tl.where(screened, second, 0.0)
    if not VARIANT.one_strength:
        unchanged = (strength == 0) & (first >= 0)
        screened = screened | unchanged
        least = tl.where(unchanged, 0.0, least)
    # A group that waits is written too: in place nothing changes, and memory gets whole sectors. What goes is finite,
    # and the sum leaves all but -0.0 as it is.
    if VARIANT.pairs and not VARIANT.has_scale:
        kept = without_smaller(words, least)
    else:
        r0, r1 = x0 * tl.where(y0 < least, 0.0, 1.0) + 0.0, x1 * tl.where(y1 < least, 0.0, 1.0) + 0.0
        r2, r3 = x2 * tl.where(y2 < least, 0.0, 1.0) + 0.0, x3 * tl.where(y3 < least, 0.0, 1.0) + 0.0
        kept = as_words((r0, r1, r2, r3), VARIANT)
    return kept, screened == 0, Largest(first, second, third, strength)


@triton.jit
def _ends_with_two(first, second, third, strength):
    """Sufficient, and where ``v1^2 + v2^2 <= 1`` necessary as well; false for NaN."""
    v1, v2, steep = strength * first, strength * second, (strength * _STEEP) * third
    square = v1 * v1 + v2 * v2
    # The factor is max(1, (1 + square) / 2); from square = 3 on, where it stays at 2, the first test holds anyway.
    return (square >= 1 + steep * steep) | (third + third * half_beyond_one(square) <= v1 * second)


@triton.jit
def is_simple(words, largest, c0, c1, c2, c3, VARIANT: tl.constexpr):
    """Whether the objective is convex on the box, or no dense point exists and the third entry appears continuously;
    and float32 can tell the entries apart in sums. And the fourth magnitudes."""
    first, second, third, strength = largest
    if VARIANT.pairs and not VARIANT.has_scale:
        fourth = smallest(words)
    else:
        x0, x1, x2, x3 = entries_of(words, VARIANT)
        y0, y1, y2, y3 = scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT)
        fourth = smaller(smaller(y0, y2), smaller(y1, y3))
    v1, v2, v3, v4 = strength * first, strength * second, strength * third, strength * fourth
    d1, d2, d3 = v1 - v4, v2 - v4, v3 - v4
    alone = (v1 * v1 + v2 * v2 <= 0.9) & (v4 <= d1 * d2 + (d1 + d2) * d3)
    convex = (v1 + v2 + v3 <= 1) & (v1 + v2 <= 0.96)
    return (third > fourth) & (v3 >= 3e-3 * v1 + 1e-14) & (convex | alone), fourth


@triton.jit
def may_become_24(largest):
    """Whether a group that waits may end with two entries that it does not have yet, or is a tie."""
    first, second, third, strength = largest
    v1, v2 = strength * first, strength * second
    # Only a tie waits with square <= 1 and two entries.
    return ((v1 * v1 + v2 * v2 <= 1) == 0) | _ends_with_two(first, second, third, strength)
