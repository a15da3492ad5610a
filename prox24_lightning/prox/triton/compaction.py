"""A queue in shared memory, in which groups wait until they fill a warp: for programs of one warp.

Triton gives a kernel no shared memory of its own, so the few instructions are written out. A slot holds the words of a
group, four entries or two pairs (``bf16_pairs.py``), its number, and one more value; numbers and values that do not fit
beside the entries lie behind all slots. The caller counts which slots are taken.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from prox24_lightning.prox.triton.interpreter import INTERPRETED, SLOT

_SIZES = [(slots, pairs) for slots in (192, 256) for pairs in (False, True)]
_OPEN = tl.constexpr(
    {
        (slots, pairs): f"{{ .shared .align 16 .b8 waiting[{slots * (16 if pairs else 24)}]; mov.u32 $0, waiting; }}"
        for slots, pairs in _SIZES
    }
)
_TAKE = tl.constexpr(
    "{ bar.warp.sync 0xffffffff; ld.shared.v4.f32 {$0, $1, $2, $3}, [$6]; ld.shared.v2.b32 {$4, $5}, [$7]; }"
)
_TAKE_PAIRS = tl.constexpr("{ bar.warp.sync 0xffffffff; ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; }")


def _put_code(groups: int, pairs: bool) -> str:
    """Instructions with which each lane writes those of its ``groups`` that wait. The distance of each from the first
    slot is the number of waiting groups before it: those of the lanes below, by a vote of the warp, and the votes on
    the earlier groups of the lanes."""
    code = "{ .reg .pred p; .reg .b32 votes, rank, before, at; bar.warp.sync 0xffffffff; mov.u32 before, 0; "
    for number in range(groups):
        slot, step, below, mask, group, value, *words = (
            f"${groups * (1 + i) + number}" for i in range(9 if pairs else 12)
        )
        code += f"setp.ne.s32 p, {mask}, 0; vote.sync.ballot.b32 votes, p, 0xffffffff; "
        code += f"and.b32 rank, votes, {below}; popc.b32 rank, rank; add.s32 rank, rank, before; "
        code += f"mad.lo.s32 rank, rank, {step}, {slot}; mad.lo.s32 at, rank, 16, {words[2 if pairs else 4]}; "
        if pairs:
            code += f"@p st.shared.v4.b32 [at], {{{words[0]}, {words[1]}, {group}, {value}}}; "
        else:
            code += f"@p st.shared.v4.f32 [at], {{{', '.join(words[:4])}}}; "
            code += f"mad.lo.s32 at, rank, 8, {words[5]}; @p st.shared.v2.b32 [at], {{{group}, {value}}}; "
        code += f"popc.b32 votes, votes; add.s32 before, before, votes; mov.u32 ${number}, 0; "
    return code + "}"


def _put_operands(groups: int, pairs: bool) -> str:
    """With ``&``, as an output is written before all inputs are read: the two must not share a register."""
    return ",".join(
        ["=&r"] * groups + [kind for kind in ("rrrrrrrrr" if pairs else "rrrrrrffffrr") for _ in range(groups)]
    )


_FORMS = [(groups, pairs) for groups in (1, 2, 4) for pairs in (False, True)]
_PUT = tl.constexpr({form: _put_code(*form) for form in _FORMS})
_PUT_OPERANDS = tl.constexpr({form: _put_operands(*form) for form in _FORMS})


class Form(NamedTuple):
    """What a queue is compiled for: how many slots, and whether words are pairs."""

    slots: Any
    pairs: Any


class Queue(NamedTuple):
    """An open queue.

    Attributes:
        place: its address; in the interpreter a pointer to memory.
        below: of each lane the mask of those below it, from which it finds its place in :func:`put`.
    """

    place: Any
    below: Any


@triton.jit
def open_queue(scratch, FORM: tl.constexpr):
    """Open the queue. Called once in a kernel: each call in the code has memory of its own."""
    nothing = tl.zeros((), tl.int32)
    if INTERPRETED:
        place, below = scratch, nothing
    else:
        code: tl.constexpr = _OPEN[(FORM.slots, FORM.pairs)]
        place = tl.inline_asm_elementwise(code, "=r,r", [nothing], tl.int32, is_pure=False, pack=1)
        below = tl.inline_asm_elementwise(
            "mov.u32 $0, %lanemask_lt;", "=r,r", [nothing], tl.int32, is_pure=True, pack=1
        )
    return Queue(place, below)


@triton.jit
def put(queue, slot, step, words, group, value, mask, FORM: tl.constexpr):
    """Write the groups that ``mask`` selects, in no order, to the slots ``slot``, ``slot + step``, and so on."""
    if INTERPRETED:
        _put_in_memory(queue, slot, step, words, group, value, mask)
    else:
        groups: tl.constexpr = mask.shape[0] // 32
        code: tl.constexpr = _PUT[(groups, FORM.pairs)]
        operands: tl.constexpr = _PUT_OPERANDS[(groups, FORM.pairs)]
        place, below = queue.place, queue.below
        mask, value = mask.to(tl.int32), value.to(tl.int32, bitcast=True)
        if FORM.pairs:
            values = [slot, step, below, mask, group, value, words[0], words[1], place]
        else:
            x0, x1, x2, x3 = words
            values = [slot, step, below, mask, group, value, x0, x1, x2, x3, place, place + FORM.slots * 16]
        tl.inline_asm_elementwise(code, operands, values, tl.int32, is_pure=False, pack=groups)


@triton.jit
def take(queue, slot, FORM: tl.constexpr):
    """The words, the number and the value of the groups in some slots."""
    if INTERPRETED:
        words, group, value = _take_from_memory(queue, slot, FORM)
    elif FORM.pairs:
        first, second, group, value = tl.inline_asm_elementwise(
            _TAKE_PAIRS,
            "=r,=r,=r,=f,r",
            [queue.place + slot * 16],
            (tl.int32, tl.int32, tl.int32, tl.float32),
            is_pure=False,
            pack=1,
        )
        words = (first, second)
    else:
        x0, x1, x2, x3, group, value = tl.inline_asm_elementwise(
            _TAKE,
            "=&f,=&f,=&f,=&f,=&r,=&f,r,r",
            [queue.place + slot * 16, queue.place + FORM.slots * 16 + slot * 8],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.int32, tl.float32),
            is_pure=False,
            pack=1,
        )
        words = (x0, x1, x2, x3)
    return words, group, value


@triton.jit
def _put_in_memory(queue, slot, step, words, group, value, mask):
    count = mask.to(tl.int32)
    at = queue.place + (slot + step * (tl.cumsum(count, axis=0) - count)) * SLOT
    for number in tl.static_range(4):
        tl.store(at + number, words[number], mask=mask)
    tl.store(at + 4, group.to(tl.int32).to(tl.float32, bitcast=True), mask=mask)
    tl.store(at + 5, value, mask=mask)


@triton.jit
def _take_from_memory(queue, slot, FORM: tl.constexpr):
    # Lanes without a group of their own may point outside of the queue.
    at = queue.place + tl.minimum(tl.maximum(slot, 0), FORM.slots - 1) * SLOT
    words = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    return words, tl.load(at + 4).to(tl.int32, bitcast=True), tl.load(at + 5)
