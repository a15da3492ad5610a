"""Groups that wait in shared memory until they fill a warp: for programs of one warp.

Triton has no shared memory of one's own, so the few instructions are written out. A slot holds the words of a group,
four entries or two pairs (``triton_pairs.py``), its number, and one more value; numbers and values that do not fit
beside the entries lie behind all slots. Who uses the queue keeps count of what is in which part of it. ``FORM`` is (how
many slots, whether words are pairs).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

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
    """By which each lane writes those of its ``groups`` that wait, each as far from the first slot as there are such
    before it: those of the lanes below, which the warp votes on, and the votes on the earlier groups of the lanes."""
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
    """The ``&`` says that an output is written before all inputs are read: the two must not share a register."""
    return ",".join(
        ["=&r"] * groups + [kind for kind in ("rrrrrrrrr" if pairs else "rrrrrrffffrr") for _ in range(groups)]
    )


_KINDS = [(groups, pairs) for groups in (1, 2, 4) for pairs in (False, True)]
_PUT = tl.constexpr({kind: _put_code(*kind) for kind in _KINDS})
_PUT_OPERANDS = tl.constexpr({kind: _put_operands(*kind) for kind in _KINDS})


@triton.jit
def open_queue(FORM: tl.constexpr):
    """The address of the queue, and of each lane the mask of those below it, by which it finds its place in
    :func:`put`. Called once in a kernel: each place in the code has a queue of its own."""
    code: tl.constexpr = _OPEN[FORM]
    nothing = tl.zeros((), tl.int32)
    return (
        tl.inline_asm_elementwise(code, "=r,r", [nothing], tl.int32, is_pure=False, pack=1),
        tl.inline_asm_elementwise("mov.u32 $0, %lanemask_lt;", "=r,r", [nothing], tl.int32, is_pure=True, pack=1),
    )


@triton.jit
def put(queue, slot, step, words, group, value, mask, FORM: tl.constexpr):
    """Write the groups that ``mask`` sets, in no order, to the slots ``slot``, ``slot + step``, and so on."""
    groups: tl.constexpr = mask.shape[0] // 32
    code: tl.constexpr = _PUT[(groups, FORM[1])]
    operands: tl.constexpr = _PUT_OPERANDS[(groups, FORM[1])]
    place, below = queue
    mask, value = mask.to(tl.int32), value.to(tl.int32, bitcast=True)
    if FORM[1]:
        values = [slot, step, below, mask, group, value, words[0], words[1], place]
    else:
        x0, x1, x2, x3 = words
        values = [slot, step, below, mask, group, value, x0, x1, x2, x3, place, place + FORM[0] * 16]
    tl.inline_asm_elementwise(code, operands, values, tl.int32, is_pure=False, pack=groups)


@triton.jit
def take(queue, slot, FORM: tl.constexpr):
    """The words, the number and the value of the groups in some slots."""
    if FORM[1]:
        first, second, group, value = tl.inline_asm_elementwise(
            _TAKE_PAIRS,
            "=r,=r,=r,=f,r",
            [queue[0] + slot * 16],
            (tl.int32, tl.int32, tl.int32, tl.float32),
            is_pure=False,
            pack=1,
        )
        words = (first, second)
    else:
        x0, x1, x2, x3, group, value = tl.inline_asm_elementwise(
            _TAKE,
            "=&f,=&f,=&f,=&f,=&r,=&f,r,r",
            [queue[0] + slot * 16, queue[0] + FORM[0] * 16 + slot * 8],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.int32, tl.float32),
            is_pure=False,
            pack=1,
        )
        words = (x0, x1, x2, x3)
    return words, group, value
