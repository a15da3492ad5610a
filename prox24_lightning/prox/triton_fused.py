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

from prox24_lightning.prox.triton_look import add_sums, look_at_results, no_sums
from prox24_lightning.prox.triton_memory import (
    SIZES,
    coordinates,
    load_groups,
    load_rows,
    read_row,
    store_groups,
    unpacked,
)
from prox24_lightning.prox.triton_queue import open_queue, put, take
from prox24_lightning.prox.triton_roots import INTERPRETED
from prox24_lightning.prox.triton_settle import SIMPLE, flags_of, other, settle, simple

DIRECT = tl.constexpr(3)
"""From this many quarters of simple groups on a tile is solved where it stands, without the queue."""


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
    PAIRED: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One weight. With ``WHOLLY`` a group that would not end with two entries stays as it is."""
    if ONE_STRENGTH:
        strength = tl.load(strength)
    tensors = (weight, out, strength, scale)
    strength_strides = (strength_before, strength_along, strength_behind)
    shape = (length, inner, strength_strides, (scale_before, scale_along, scale_behind))
    kind: tl.constexpr = (ONE_STRENGTH, HAS_SCALE, ROWS, WIDE, WHOLLY, PAIRED, False)
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
    PAIRED: tl.constexpr,
    LOOK: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Many weights in place, a row of ``table`` and a strength each; ``owners`` says whose part a program works on, and
    ``like`` of which dtype they all are."""
    number = tl.load(owners + tl.program_id(0))
    weight, scale, groups, programs, shape = read_row(table, number, like)
    program = tl.program_id(0) - tl.load(table + number * 10 + 9).to(tl.int32)
    kind: tl.constexpr = (True, HAS_SCALE, ROWS, WIDE, WHOLLY, PAIRED, LOOK)
    code = tl.load(codes + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    before = tl.load(befores + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    tensors = (weight, weight, tl.load(strengths + number), scale, sums + number * 10, code, before)
    walk(tensors, shape, groups, program, programs, kind, TILE, ROUND)


@triton.jit
def walk(tensors, shape, groups, program, programs, KIND: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr):
    """The prox of the tiles that fall to one of the programs."""
    if INTERPRETED:
        _walk_plainly(tensors, shape, groups, program * TILE, programs * TILE, KIND, TILE)
    else:
        _walk(tensors, shape, groups, program * TILE, programs * TILE, KIND, TILE, ROUND)


@triton.jit
def _walk_plainly(tensors, shape, groups, begin, step, KIND: tl.constexpr, TILE: tl.constexpr):
    """As :func:`_walk`, without the queue, for Triton's interpreter."""
    group = tl.arange(0, TILE)
    sums = no_sums(TILE)
    while begin < groups:
        inside = group < groups - begin
        x0, x1, x2, x3 = load_groups(tensors[0], shape, begin, group, inside, KIND)
        r0, r1, r2, r3, waits, sizes = settle(x0, x1, x2, x3, tensors, shape, begin, group, inside, KIND)
        flags = flags_of(sizes, waits, KIND)
        lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
        q0, q1, q2, q3 = simple(r0, r1, r2, r3, lam, c0, c1, c2, c3, flags == SIMPLE, KIND)
        p0, p1, p2, p3, left = other(x0, x1, x2, x3, lam, c0, c1, c2, c3, KIND, False)
        if not KIND[4]:
            d0, d1, d2, d3, _ = other(x0, x1, x2, x3, lam, c0, c1, c2, c3, KIND, True)
            p0, p1, p2, p3 = _chosen(left, d0, d1, d2, d3, p0, p1, p2, p3)
        q0, q1, q2, q3 = _chosen(flags == SIMPLE, q0, q1, q2, q3, p0, p1, p2, p3)
        r0, r1, r2, r3 = _chosen(flags == 0, r0, r1, r2, r3, q0, q1, q2, q3)
        store_groups(tensors[1], shape, begin, group, inside, r0, r1, r2, r3, KIND)
        if KIND[6]:
            sums = look_at_results(sums, tensors, shape, begin, group, inside, r0, r1, r2, r3, KIND)
        begin += step
    if KIND[6]:
        add_sums(tensors[4], sums)


@triton.jit
def _chosen(which, a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.where(which, a0, b0), tl.where(which, a1, b1), tl.where(which, a2, b2), tl.where(which, a3, b3)


@triton.jit
def _walk(tensors, shape, groups, begin, step, KIND: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr):
    """The queue has the simple groups at its bottom, the dense ones at its top, and below those, downwards, the
    others."""
    queue = open_queue()
    above: tl.constexpr = TILE + 2 * ROUND
    simples = tl.zeros((), tl.int32)
    others = tl.zeros((), tl.int32)
    denses = tl.zeros((), tl.int32)
    lanes = tl.arange(0, ROUND)
    group = tl.arange(0, TILE)
    tile_sums, round_sums = no_sums(TILE), no_sums(ROUND)
    if KIND[2]:
        ahead = load_rows(tensors[0], begin, group, group < groups - begin, KIND)
    while begin - step < groups:  # the last time nothing comes in, and what waits goes out
        inside = group < groups - begin
        ends = begin >= groups
        if KIND[2]:  # the next tile is on its way while this one is worked on
            x0, x1, x2, x3 = unpacked(ahead, KIND)
            ahead = load_rows(tensors[0], begin + step, group, group < groups - begin - step, KIND)
        else:
            x0, x1, x2, x3 = load_groups(tensors[0], shape, begin, group, inside, KIND)
        r0, r1, r2, r3, waits, sizes = settle(x0, x1, x2, x3, tensors, shape, begin, group, inside, KIND)
        flags = tl.zeros_like(group)
        if tl.max(waits.to(tl.int32), axis=0) > 0:
            flags = flags_of(sizes, waits, KIND)
            many = tl.sum(flags, axis=0)
            if (not KIND[4]) and (many & 65535) >= (DIRECT * TILE) // 4:
                lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
                q0, q1, q2, q3 = simple(r0, r1, r2, r3, lam, c0, c1, c2, c3, flags == SIMPLE, KIND)
                r0, r1, r2, r3 = _chosen(flags == SIMPLE, q0, q1, q2, q3, r0, r1, r2, r3)
                flags = tl.where(flags == SIMPLE, 0, flags)
                many -= many & 65535
            if many > 0:
                rank = _ranks(flags, TILE)
                slot = tl.where(flags == SIMPLE, simples + (rank & 65535), above - 1 - others - (rank >> 16))
                put(queue, slot, r0, r1, r2, r3, begin + group, flags > 0)
                simples += many & 65535
                others += many >> 16
        store_groups(tensors[1], shape, begin, group, inside, r0, r1, r2, r3, KIND)
        if KIND[6]:
            settled = inside & (flags == 0)
            tile_sums = look_at_results(tile_sums, tensors, shape, begin, group, settled, r0, r1, r2, r3, KIND)
        least = tl.where(ends, 1, ROUND)
        if not KIND[4]:
            while simples >= least:
                taken = tl.minimum(simples, ROUND)
                simples -= taken
                mine = lanes < taken
                round_sums = _solve_simple(tensors, shape, queue, simples + lanes, mine, round_sums, KIND)
        while others + tl.where(ends, denses, 0) >= least:
            taken = tl.minimum(others, ROUND)
            others -= taken
            slot, mine = above - 1 - others - lanes, lanes < taken
            if KIND[4]:
                _, round_sums = _solve_other(tensors, shape, queue, slot, mine, slot, round_sums, KIND, False)
            else:
                free = above + denses
                added, round_sums = _solve_other(tensors, shape, queue, slot, mine, free, round_sums, KIND, False)
                denses += added
                if (denses >= ROUND) | ((others == 0) & ends):
                    taken = tl.minimum(denses, ROUND)
                    denses -= taken
                    slot = above + denses + lanes
                    mine = lanes < taken
                    _, round_sums = _solve_other(tensors, shape, queue, slot, mine, slot, round_sums, KIND, True)
        begin += step
    if KIND[6]:
        add_sums(tensors[4], tile_sums)
        add_sums(tensors[4], round_sums)


@triton.jit
def _solve_simple(tensors, shape, queue, slot, inside, sums, KIND: tl.constexpr):
    x0, x1, x2, x3, group = take(queue, slot)
    begin = tl.zeros((), tl.int32)
    lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
    r0, r1, r2, r3 = simple(x0, x1, x2, x3, lam, c0, c1, c2, c3, inside, KIND)
    store_groups(tensors[1], shape, begin, group, inside, r0, r1, r2, r3, KIND)
    if KIND[6]:
        sums = look_at_results(sums, tensors, shape, begin, group, inside, r0, r1, r2, r3, KIND)
    return sums


@triton.jit
def _solve_other(tensors, shape, queue, slot, inside, free, sums, KIND: tl.constexpr, DENSE: tl.constexpr):
    """Solve other groups; those for which a dense point is possible go into the slots from ``free`` on. How many those
    are, and the sums."""
    x0, x1, x2, x3, group = take(queue, slot)
    begin = tl.zeros((), tl.int32)
    lam, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, KIND)
    r0, r1, r2, r3, left = other(x0, x1, x2, x3, lam, c0, c1, c2, c3, KIND, DENSE)
    waits = tl.zeros_like(group)
    if not (KIND[4] or DENSE):
        waits = (inside & left).to(tl.int32)
        put(queue, free + tl.cumsum(waits, 0) - waits, x0, x1, x2, x3, group, waits)
    solved = inside & (waits == 0)
    store_groups(tensors[1], shape, begin, group, solved, r0, r1, r2, r3, KIND)
    if KIND[6]:
        sums = look_at_results(sums, tensors, shape, begin, group, solved, r0, r1, r2, r3, KIND)
    return tl.sum(waits, axis=0), sums


@triton.jit
def _ranks(flags, TILE: tl.constexpr):
    """The sum of the flags before each entry, in the order of the lanes of a warp, entries of a lane in a row: one scan
    over lanes instead of one over the tile."""
    table = tl.reshape(flags, [TILE // 32, 32])
    running = tl.cumsum(table, 0)
    lane = tl.sum(table, 0)
    before = tl.cumsum(lane, 0) - lane
    return tl.reshape(running - table + before[None, :], [TILE])
