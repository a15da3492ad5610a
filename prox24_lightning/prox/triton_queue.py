"""Groups that wait in shared memory until they fill a warp: for programs of one warp.

Triton has no shared memory of one's own, so the few instructions are written out. A slot holds the four entries and the
number of a group; who uses the queue keeps count of what is in which part of it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = tl.constexpr(192)
"""Of which a program has ``20 * SLOTS`` bytes."""
_OPEN = tl.constexpr("{ .shared .align 16 .b8 waiting[3840]; mov.u32 $0, waiting; }")
_PUT = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $8, 0; bar.warp.sync 0xffffffff; "
    "@p st.shared.v4.f32 [$1], {$3, $4, $5, $6}; @p st.shared.s32 [$2], $7; mov.u32 $0, 0; }"
)
_TAKE = tl.constexpr("{ bar.warp.sync 0xffffffff; ld.shared.v4.f32 {$0, $1, $2, $3}, [$5]; ld.shared.s32 $4, [$6]; }")


@triton.jit
def open_queue():
    """The address of the queue. Called once in a kernel: each place in the code has a queue of its own."""
    nothing = tl.zeros((), tl.int32)
    return tl.inline_asm_elementwise(_OPEN, "=r,r", [nothing], tl.int32, is_pure=False, pack=1)


@triton.jit
def put(queue, slot, x0, x1, x2, x3, group, mask):
    """Write groups to their slots where ``mask`` is set."""
    entries, number = queue + slot * 16, queue + SLOTS * 16 + slot * 4
    tl.inline_asm_elementwise(
        _PUT,
        "=r,r,r,f,f,f,f,r,r",
        [entries, number, x0, x1, x2, x3, group, mask.to(tl.int32)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def take(queue, slot):
    """The four entries and the number of the groups in some slots."""
    return tl.inline_asm_elementwise(
        _TAKE,
        "=f,=f,=f,=f,=r,r,r",
        [queue + slot * 16, queue + SLOTS * 16 + slot * 4],
        (tl.float32, tl.float32, tl.float32, tl.float32, tl.int32),
        is_pure=False,
        pack=1,
    )
