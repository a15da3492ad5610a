"""The walk of the fused kernel without a queue, for Triton's interpreter, which has no instructions of a GPU."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.memory import chosen, coordinates, load_groups, store_groups
from prox24_lightning.prox.triton.settle import are_simple, may_change, other, settle, simple
from prox24_lightning.prox.triton.statistics import add_sums, look_at_results, no_sums


@triton.jit
def walk_plainly(tensors, shape, groups, begin, step, KIND: tl.constexpr, TILE: tl.constexpr):
    """The prox of every ``step``-th tile from ``begin`` on: each group by all solvers."""
    group = tl.arange(0, TILE)
    sums = no_sums(TILE)
    while begin < groups:
        inside = group < groups - begin
        words = load_groups(tensors[0], shape, begin, group, inside, KIND)
        kept, waits, largest = settle(words, tensors, shape, begin, group, inside, KIND)
        lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
        solved, left, root = other(words, lam, c0, c1, c2, c3, lam, KIND, False)
        if KIND[4]:
            waits = waits & may_change(largest)
        else:
            dense, _, _ = other(words, lam, c0, c1, c2, c3, root, KIND, True)
            easy, _ = are_simple(words, largest, c0, c1, c2, c3, KIND)
            easily = simple(words, None, lam, c0, c1, c2, c3, waits & easy, KIND)
            solved = chosen(easy, easily, chosen(left, dense, solved, KIND), KIND)
        kept = chosen(waits, solved, kept, KIND)
        store_groups(tensors[1], shape, begin, group, inside, kept, KIND)
        if KIND[6]:
            sums = look_at_results(sums, tensors, shape, begin, group, inside, kept, KIND)
        begin += step
    if KIND[6]:
        add_sums(tensors[4], sums)
