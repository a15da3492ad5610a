"""The fused kernel: a program walks through its tiles, settles what cheap tests settle, and queues the rest.

The programs of a weight take its tiles in turn, so that those that run at the same time are neighbours in memory.

A warp pays for an equation as soon as one of its groups needs it. So a program (one warp) collects the groups that need
one in shared memory, and solves them when there are enough to fill the warp. There are three kinds: simple ones;
others, whose 3-sparse point is found and compared; and those of them for which that leaves a dense point possible.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.compaction import open_queue, put, take
from prox24_lightning.prox.triton.interpreter import walk_plainly
from prox24_lightning.prox.triton.memory import (
    SIZES,
    chosen,
    coordinates,
    fetch_tile,
    load_groups,
    load_tile,
    read_row,
    store_groups,
    store_tile,
    words_of,
)
from prox24_lightning.prox.triton.roots import INTERPRETED
from prox24_lightning.prox.triton.settle import are_simple, may_change, other, settle, simple
from prox24_lightning.prox.triton.statistics import add_sums, look_at_results, no_sums

FEW = tl.constexpr(1)
"""Where fewer than a quarter of a tile wait they all go to the solver of the others: to tell the kinds apart costs more
than it saves. Both solvers end at the optimum, by objective; their entries may differ by some 1e-5 of the largest."""
DIRECT = tl.constexpr(3)
"""From this many quarters of simple groups on a tile is solved where it stands, without the queue."""
FETCHED, FETCHED_PAIRS = tl.constexpr(1), tl.constexpr(2)
"""A tile is brought into the device's cache so many tiles before it is loaded; those of pairs are half as long."""


@triton.jit(do_not_specialize=SIZES)
def prox_kernel(
    weight,
    out,
    strength,
    scale,
    groups,
    programs,
    length,
    inner,
    strength_before,
    strength_along,
    strength_behind,
    scale_before,
    scale_along,
    scale_behind,
    ONE_STRENGTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One weight. With ``WHOLLY`` a group that would not end with two entries stays as it is."""
    if ONE_STRENGTH:
        strength = tl.load(strength)
    tensors = (weight, out, strength, scale)
    strength_strides = (strength_before, strength_along, strength_behind)
    shape = (length, inner, strength_strides, (scale_before, scale_along, scale_behind))
    words: tl.constexpr = ALIGNED and ROWS and not INTERPRETED
    pairs: tl.constexpr = words and weight.dtype.element_ty == tl.bfloat16
    entries: tl.constexpr = words and weight.dtype.element_ty == tl.float32
    kind: tl.constexpr = (ONE_STRENGTH, HAS_SCALE, ROWS, WIDE, WHOLLY, pairs, False, entries)
    walk(tensors, shape, groups, tl.program_id(0), programs, kind, TILE, ROUND)


@triton.jit
def prox_many_kernel(
    table,
    owners,
    strengths,
    sums,
    codes,
    befores,
    like,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOK: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Many weights in place, a row of ``table`` and a strength each; ``owners`` says whose part a program works on, and
    ``like`` of which dtype they all are."""
    number = tl.load(owners + tl.program_id(0))
    weight, scale, groups, programs, shape = read_row(table, number, like)
    program = tl.program_id(0) - tl.load(table + number * 10 + 9).to(tl.int32)
    words: tl.constexpr = ALIGNED and ROWS and not INTERPRETED
    pairs: tl.constexpr = words and weight.dtype.element_ty == tl.bfloat16
    entries: tl.constexpr = words and weight.dtype.element_ty == tl.float32
    kind: tl.constexpr = (True, HAS_SCALE, ROWS, WIDE, WHOLLY, pairs, LOOK, entries)
    code = tl.load(codes + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    before = tl.load(befores + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    tensors = (weight, weight, tl.load(strengths + number), scale, sums + number * 10, code, before)
    walk(tensors, shape, groups, program, programs, kind, TILE, ROUND)


@triton.jit
def walk(tensors, shape, groups, program, programs, KIND: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr):
    """The prox of the tiles that fall to one of the programs."""
    if INTERPRETED:
        walk_plainly(tensors, shape, groups, program * TILE, programs * TILE, KIND, TILE)
    else:
        _walk(tensors, shape, groups, program * TILE, programs * TILE, KIND, TILE, ROUND)


@triton.jit
def _count(which):
    return tl.sum(which.to(tl.int32), axis=0)


@triton.jit
def _walk(tensors, shape, groups, begin, step, KIND: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr):
    """The queue has the simple groups at its bottom, the dense ones at its top, and below those, downwards, the
    others."""
    form: tl.constexpr = (TILE + 4 * ROUND, KIND[5])
    queue = open_queue(form)
    above: tl.constexpr = TILE + 2 * ROUND
    far: tl.constexpr = 1 + (FETCHED_PAIRS if KIND[5] else FETCHED)
    simples = tl.zeros((), tl.int32)
    others = tl.zeros((), tl.int32)
    denses = tl.zeros((), tl.int32)
    lanes = tl.arange(0, ROUND)
    group = tl.arange(0, TILE)
    tile_sums, round_sums = no_sums(TILE), no_sums(ROUND)
    if KIND[2]:
        ahead = load_tile(tensors[0], begin, group, groups - begin, KIND)
    while begin - step < groups:  # the last time nothing comes in, and what waits goes out
        left = groups - begin
        inside = group < left
        if KIND[2]:  # the next tile is on its way while this one is worked on
            words = words_of(ahead, KIND)
            fetch_tile(tensors[0], begin + far * step, left - far * step, TILE)
            ahead = load_tile(tensors[0], begin + step, group, left - step, KIND)
        else:
            words = load_groups(tensors[0], shape, begin, group, inside, KIND)
        kept, waits, largest = settle(words, tensors, shape, begin, group, inside, KIND)
        waiting = _count(waits)
        if waiting > 0:
            if KIND[4]:
                waits = waits & may_change(largest)
                waiting = _count(waits)
                put(queue, above - 1 - others, -1, kept, begin + group, kept[0], waits, form)
                others += waiting
            elif waiting < (FEW * TILE) // 4:
                put(queue, above - 1 - others, -1, kept, begin + group, kept[0], waits, form)
                others += waiting
            else:
                lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
                easy, fourth = are_simple(words, largest, c0, c1, c2, c3, KIND)
                easy = waits & easy
                hard = waits & (easy == 0)
                many = _count(easy)
                waiting -= many
                if many >= (DIRECT * TILE) // 4:
                    ordered = (largest[0], largest[1], largest[2], fourth)
                    kept = chosen(easy, simple(kept, ordered, lam, c0, c1, c2, c3, easy, KIND), kept, KIND)
                    waits = hard
                else:
                    put(queue, simples, 1, kept, begin + group, kept[0], easy, form)
                    simples += many
                if waiting > 0:
                    put(queue, above - 1 - others, -1, kept, begin + group, kept[0], hard, form)
                    others += waiting
        store_tile(tensors[1], shape, begin, group, left, kept, KIND)
        if KIND[6]:
            settled = inside & (waits == 0)
            tile_sums = look_at_results(tile_sums, tensors, shape, begin, group, settled, kept, KIND)
        ends = left <= 0
        least = tl.where(ends, 1, ROUND)
        if not KIND[4]:
            while simples >= least:
                taken = tl.minimum(simples, ROUND)
                simples -= taken
                mine = lanes < taken
                round_sums = _solve_simple(tensors, shape, groups, queue, simples + lanes, mine, round_sums, KIND, form)
        while others + tl.where(ends, denses, 0) >= least:
            taken = tl.minimum(others, ROUND)
            others -= taken
            slot, mine = above - 1 - others - lanes, lanes < taken
            if KIND[4]:
                _, round_sums = _solve_other(
                    tensors, shape, groups, queue, slot, mine, slot, round_sums, KIND, form, False
                )
            else:
                free = above + denses
                added, round_sums = _solve_other(
                    tensors, shape, groups, queue, slot, mine, free, round_sums, KIND, form, False
                )
                denses += added
                if (denses >= ROUND) | ((others == 0) & ends):
                    taken = tl.minimum(denses, ROUND)
                    denses -= taken
                    slot = above + denses + lanes
                    mine = lanes < taken
                    _, round_sums = _solve_other(
                        tensors, shape, groups, queue, slot, mine, slot, round_sums, KIND, form, True
                    )
        begin += step
    if KIND[6]:
        add_sums(tensors[4], tile_sums)
        add_sums(tensors[4], round_sums)


@triton.jit
def _solve_simple(tensors, shape, groups, queue, slot, inside, sums, KIND: tl.constexpr, FORM: tl.constexpr):
    words, group, _ = take(queue, slot, FORM)
    inside = inside & (group < groups)
    begin = tl.zeros((), tl.int32)
    lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
    solved = simple(words, None, lam, c0, c1, c2, c3, inside, KIND)
    store_groups(tensors[1], shape, begin, group, inside, solved, KIND)
    if KIND[6]:
        sums = look_at_results(sums, tensors, shape, begin, group, inside, solved, KIND)
    return sums


@triton.jit
def _solve_other(
    tensors, shape, groups, queue, slot, inside, free, sums, KIND: tl.constexpr, FORM: tl.constexpr, DENSE: tl.constexpr
):
    """Solve other groups; those for which a dense point is possible go into the slots from ``free`` on. How many those
    are, and the sums."""
    words, group, root = take(queue, slot, FORM)
    inside = inside & (group < groups)
    begin = tl.zeros((), tl.int32)
    lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
    solved, left, root = other(words, lam, c0, c1, c2, c3, root, KIND, DENSE)
    added = tl.zeros((), tl.int32)
    if not (KIND[4] or DENSE):
        waits = inside & left
        put(queue, free, 1, words, group, root, waits, FORM)
        added = _count(waits)
        inside = inside & (waits == 0)
    store_groups(tensors[1], shape, begin, group, inside, solved, KIND)
    if KIND[6]:
        sums = look_at_results(sums, tensors, shape, begin, group, inside, solved, KIND)
    return added, sums
