"""Groups that wait in shared memory until they fill a warp: for programs of one warp.

Triton has no shared memory of one's own, so the few instructions are written out. A slot holds the words of a group,
four entries or two pairs (``triton_pairs.py``), and its number; who uses the queue keeps count of what is in which part
of it.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

_BYTES = 4096
_NUMBERS = tl.constexpr(_BYTES // 20 * 16)
"""Where the numbers of the groups begin that do not fit beside their entries."""
_OPEN = tl.constexpr(f"{{ .shared .align 16 .b8 waiting[{_BYTES}]; mov.u32 $0, waiting; }}")
_TAKE = tl.constexpr("{ bar.warp.sync 0xffffffff; ld.shared.v4.f32 {$0, $1, $2, $3}, [$5]; ld.shared.s32 $4, [$6]; }")
_TAKE_PAIRS = tl.constexpr("{ .reg .b32 no; bar.warp.sync 0xffffffff; ld.shared.v4.b32 {$0, $1, $2, no}, [$3]; }")


def _put_code(groups: int, pairs: bool) -> str:
    """By which each lane writes those of its ``groups`` that wait, each as far from the first slot as there are such
    before it: those of the lanes below, which the warp votes on, and the votes on the earlier groups of the lanes."""
    code = "{ .reg .pred p; .reg .b32 lower, votes, rank, before, at; bar.warp.sync 0xffffffff; "
    code += "mov.u32 lower, %lanemask_lt; mov.u32 before, 0; "
    for number in range(groups):
        slot, step, mask, group, *words = (f"${groups * (1 + i) + number}" for i in range(7 if pairs else 10))
        code += f"setp.ne.s32 p, {mask}, 0; vote.sync.ballot.b32 votes, p, 0xffffffff; "
        code += "and.b32 rank, votes, lower; popc.b32 rank, rank; add.s32 rank, rank, before; "
        code += f"mad.lo.s32 rank, rank, {step}, {slot}; mad.lo.s32 at, rank, 16, {words[2 if pairs else 4]}; "
        if pairs:
            code += f"@p st.shared.v4.b32 [at], {{{words[0]}, {words[1]}, {group}, {group}}}; "
        else:
            code += f"@p st.shared.v4.f32 [at], {{{', '.join(words[:4])}}}; "
            code += f"mad.lo.s32 at, rank, 4, {words[5]}; @p st.shared.s32 [at], {group}; "
        code += f"popc.b32 votes, votes; add.s32 before, before, votes; mov.u32 ${number}, 0; "
    return code + "}"


def _put_operands(groups: int, pairs: bool) -> str:
    return ",".join(["=r"] * groups + [kind for kind in ("rrrrrrr" if pairs else "rrrrffffrr") for _ in range(groups)])


_KINDS = [(groups, pairs) for groups in (1, 2, 4) for pairs in (False, True)]
_PUT = tl.constexpr({kind: _put_code(*kind) for kind in _KINDS})
_PUT_OPERANDS = tl.constexpr({kind: _put_operands(*kind) for kind in _KINDS})


@triton.jit
def open_queue():
    """The address of the queue. Called once in a kernel: each place in the code has a queue of its own."""
    nothing = tl.zeros((), tl.int32)
    return tl.inline_asm_elementwise(_OPEN, "=r,r", [nothing], tl.int32, is_pure=False, pack=1)


@triton.jit
def put(queue, slot, step, words, group, mask, PAIRS: tl.constexpr):
    """Write the groups that ``mask`` sets, in no order, to the slots ``slot``, ``slot + step``, and so on."""
    groups: tl.constexpr = mask.shape[0] // 32
    code: tl.constexpr = _PUT[(groups, PAIRS)]
    operands: tl.constexpr = _PUT_OPERANDS[(groups, PAIRS)]
    mask = mask.to(tl.int32)
    if PAIRS:
        values = [slot, step, mask, group, words[0], words[1], queue]
    else:
        values = [slot, step, mask, group, words[0], words[1], words[2], words[3], queue, queue + _NUMBERS]
    tl.inline_asm_elementwise(code, operands, values, tl.int32, is_pure=False, pack=groups)


@triton.jit
def take(queue, slot, PAIRS: tl.constexpr):
    """The words and the number of the groups in some slots."""
    if PAIRS:
        first, second, group = tl.inline_asm_elementwise(
            _TAKE_PAIRS, "=r,=r,=r,r", [queue + slot * 16], (tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )
        words = (first, second)
    else:
        x0, x1, x2, x3, group = tl.inline_asm_elementwise(
            _TAKE,
            "=f,=f,=f,=f,=r,r,r",
            [queue + slot * 16, queue + _NUMBERS + slot * 4],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.int32),
            is_pure=False,
            pack=1,
        )
        words = (x0, x1, x2, x3)
    return words, group
