"""The fused kernel: a program walks through its tiles, screens their groups, and queues those that need an equation.

The programs of a weight take its tiles in turn, so that those that run at the same time are neighbours in memory.

A warp pays for an equation as soon as one of its groups needs it. So a program (one warp) collects the groups that need
one in shared memory, and solves them when there are enough to fill the warp. There are three kinds: simple groups;
general ones, whose 3-sparse point is found and compared; and dense ones, general groups for which that leaves a dense
point possible.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.arguments import SIZES, Layout, Strides, Tensors, Variant
from prox24_lightning.prox.triton.compaction import Form, open_queue, put, take
from prox24_lightning.prox.triton.interpreter import INTERPRETED
from prox24_lightning.prox.triton.memory import (
    chosen,
    coordinates,
    fetch_tile,
    load_groups,
    load_tile,
    store_groups,
    store_tile,
    words_of,
)
from prox24_lightning.prox.triton.screening import is_simple, may_become_24, screen
from prox24_lightning.prox.triton.solve import solve_general, solve_simple
from prox24_lightning.prox.triton.statistics import accumulate_results, add_sums, zero_sums

FEW = tl.constexpr(1)
"""Where fewer quarters of a tile wait, all go to the general solver: to tell the kinds apart costs more than it saves.
Both solvers end at the optimum, by objective; their entries may differ by some 1e-5 of the largest."""
DIRECT = tl.constexpr(3)
"""With this many quarters of simple groups or more a tile is solved where it stands, without the queue."""
FETCHED, FETCHED_PAIRS = tl.constexpr(1), tl.constexpr(2)
"""Tiles between the prefetch of one and its loading; a tile of pairs has half the bytes."""


@triton.jit(do_not_specialize=SIZES)
def prox_kernel(
    weight,
    out,
    strength,
    scale,
    scratch,
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
    LAST_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    SETTLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One weight. With ``SETTLE`` a group that would not end with two entries stays as it is."""
    if ONE_STRENGTH:
        strength = tl.load(strength)
    tensors = Tensors(weight, out, strength, scale, scale, scale, scale, scratch)
    strength_strides = Strides(strength_before, strength_along, strength_behind)
    layout = Layout(length, inner, strength_strides, Strides(scale_before, scale_along, scale_behind))
    words: tl.constexpr = ALIGNED and LAST_DIM and not INTERPRETED
    variant: tl.constexpr = Variant(
        one_strength=ONE_STRENGTH,
        has_scale=HAS_SCALE,
        last_dim=LAST_DIM,
        wide=WIDE,
        settle=SETTLE,
        pairs=words and weight.dtype.element_ty == tl.bfloat16,
        vectors=words and weight.dtype.element_ty == tl.float32,
        statistics=False,
    )
    prox_tiles(tensors, layout, groups, tl.program_id(0), programs, variant, TILE, ROUND)


@triton.jit
def _count(which):
    return tl.sum(which.to(tl.int32), axis=0)


@triton.jit
def prox_tiles(
    tensors, layout, groups, program, programs, VARIANT: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr
):
    """The prox of the tiles that fall to one of the programs.

    The queue has the simple groups at its bottom, the dense ones at its top, and below those, downwards, the general
    ones.
    """
    begin, step = program * TILE, programs * TILE
    form: tl.constexpr = Form(slots=TILE + 4 * ROUND, pairs=VARIANT.pairs)
    queue = open_queue(tensors.scratch, form)
    above: tl.constexpr = TILE + 2 * ROUND
    far: tl.constexpr = 1 + (FETCHED_PAIRS if VARIANT.pairs else FETCHED)
    simples = tl.zeros((), tl.int32)
    generals = tl.zeros((), tl.int32)
    denses = tl.zeros((), tl.int32)
    lanes = tl.arange(0, ROUND)
    group = tl.arange(0, TILE)
    tile_sums, round_sums = zero_sums(TILE), zero_sums(ROUND)
    if VARIANT.last_dim:
        ahead = load_tile(tensors.source, begin, group, groups - begin, VARIANT)
    while begin - step < groups:  # the last time nothing comes in, and what waits goes out
        left = groups - begin
        inside = group < left
        if VARIANT.last_dim:  # the next tile is on its way while this one is worked on
            words = words_of(ahead, VARIANT)
            fetch_tile(tensors.source, begin + far * step, left - far * step, TILE)
            ahead = load_tile(tensors.source, begin + step, group, left - step, VARIANT)
        else:
            words = load_groups(tensors.source, layout, begin, group, inside, VARIANT)
        kept, waits, largest = screen(words, tensors, layout, begin, group, inside, VARIANT)
        waiting = _count(waits)
        if waiting > 0:
            if VARIANT.settle:
                waits = waits & may_become_24(largest)
                waiting = _count(waits)
                put(queue, above - 1 - generals, -1, kept, begin + group, kept[0], waits, form)
                generals += waiting
            elif waiting < (FEW * TILE) // 4:
                put(queue, above - 1 - generals, -1, kept, begin + group, kept[0], waits, form)
                generals += waiting
            else:
                strength, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
                easy, fourth = is_simple(words, largest, c0, c1, c2, c3, VARIANT)
                easy = waits & easy
                hard = waits & (easy == 0)
                many = _count(easy)
                waiting -= many
                if many >= (DIRECT * TILE) // 4:
                    magnitudes = (largest.first, largest.second, largest.third, fourth)
                    solved = solve_simple(kept, magnitudes, strength, c0, c1, c2, c3, easy, VARIANT)
                    kept = chosen(easy, solved, kept, VARIANT)
                    waits = hard
                else:
                    put(queue, simples, 1, kept, begin + group, kept[0], easy, form)
                    simples += many
                if waiting > 0:
                    put(queue, above - 1 - generals, -1, kept, begin + group, kept[0], hard, form)
                    generals += waiting
        store_tile(tensors.target, layout, begin, group, left, kept, VARIANT)
        if VARIANT.statistics:
            settled = inside & (waits == 0)
            tile_sums = accumulate_results(tile_sums, tensors, layout, begin, group, settled, kept, VARIANT)
        ends = left <= 0
        least = tl.where(ends, 1, ROUND)
        if not VARIANT.settle:
            while simples >= least:
                taken = tl.minimum(simples, ROUND)
                simples -= taken
                mine = lanes < taken
                round_sums = _drain_simple(
                    tensors, layout, groups, queue, simples + lanes, mine, round_sums, VARIANT, form
                )
        while generals + tl.where(ends, denses, 0) >= least:
            taken = tl.minimum(generals, ROUND)
            generals -= taken
            slot, mine = above - 1 - generals - lanes, lanes < taken
            if VARIANT.settle:
                _, round_sums = _drain_general(
                    tensors, layout, groups, queue, slot, mine, slot, round_sums, VARIANT, form, False
                )
            else:
                free = above + denses
                added, round_sums = _drain_general(
                    tensors, layout, groups, queue, slot, mine, free, round_sums, VARIANT, form, False
                )
                denses += added
                if (denses >= ROUND) | ((generals == 0) & ends):
                    taken = tl.minimum(denses, ROUND)
                    denses -= taken
                    slot = above + denses + lanes
                    mine = lanes < taken
                    _, round_sums = _drain_general(
                        tensors, layout, groups, queue, slot, mine, slot, round_sums, VARIANT, form, True
                    )
        begin += step
    if VARIANT.statistics:
        add_sums(tensors.sums, tile_sums)
        add_sums(tensors.sums, round_sums)


@triton.jit
def _drain_simple(tensors, layout, groups, queue, slot, inside, sums, VARIANT: tl.constexpr, FORM: tl.constexpr):
    """Solve the simple groups in the slots; the sums with their results."""
    words, group, _ = take(queue, slot, FORM)
    inside = inside & (group < groups)
    begin = tl.zeros((), tl.int32)
    strength, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
    solved = solve_simple(words, None, strength, c0, c1, c2, c3, inside, VARIANT)
    store_groups(tensors.target, layout, begin, group, inside, solved, VARIANT)
    if VARIANT.statistics:
        sums = accumulate_results(sums, tensors, layout, begin, group, inside, solved, VARIANT)
    return sums


@triton.jit
def _drain_general(
    tensors,
    layout,
    groups,
    queue,
    slot,
    inside,
    free,
    sums,
    VARIANT: tl.constexpr,
    FORM: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Solve the general groups in the slots; put those for which a dense point is possible into the slots from ``free``
    on. The number of these, and the sums with the results of the others."""
    words, group, root = take(queue, slot, FORM)
    inside = inside & (group < groups)
    begin = tl.zeros((), tl.int32)
    strength, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, VARIANT)
    solved, left, root = solve_general(words, strength, c0, c1, c2, c3, root, VARIANT, DENSE)
    added = tl.zeros((), tl.int32)
    if not (VARIANT.settle or DENSE):
        waits = inside & left
        put(queue, free, 1, words, group, root, waits, FORM)
        added = _count(waits)
        inside = inside & (waits == 0)
    store_groups(tensors.target, layout, begin, group, inside, solved, VARIANT)
    if VARIANT.statistics:
        sums = accumulate_results(sums, tensors, layout, begin, group, inside, solved, VARIANT)
    return added, sums
