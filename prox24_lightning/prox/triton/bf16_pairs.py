"""bfloat16 weights as they are in memory, two in 32 bits: sorted and pruned two at a time, which is exact.

From compute capability 9.0 on. A group is two such words, (x0, x1) and (x2, x3).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# The larger and the smaller of (x0, x2) and of (x1, x3) are found in the words of each group; those of two groups
# are then laid side by side.
_SORTED = tl.constexpr("""{
.reg .b32 a, b, c, d, high, low, upper, lower;
and.b32 a, $6, 0x7fff7fff;
and.b32 b, $8, 0x7fff7fff;
and.b32 c, $7, 0x7fff7fff;
and.b32 d, $9, 0x7fff7fff;
max.NaN.bf16x2 high, a, b;
min.NaN.bf16x2 low, a, b;
max.NaN.bf16x2 upper, c, d;
min.NaN.bf16x2 lower, c, d;
prmt.b32 a, high, upper, 0x5410;
prmt.b32 b, high, upper, 0x7632;
prmt.b32 c, low, lower, 0x5410;
prmt.b32 d, low, lower, 0x7632;
max.NaN.bf16x2 high, a, b;
min.NaN.bf16x2 a, a, b;
max.NaN.bf16x2 c, c, d;
max.NaN.bf16x2 b, a, c;
min.NaN.bf16x2 a, a, c;
shl.b32 $0, high, 16;
and.b32 $1, high, 0xffff0000;
shl.b32 $2, b, 16;
and.b32 $3, b, 0xffff0000;
shl.b32 $4, a, 16;
and.b32 $5, a, 0xffff0000;
}""")
_SMALLEST = tl.constexpr("""{
.reg .b32 a, b, c, d;
and.b32 a, $2, 0x7fff7fff;
and.b32 b, $4, 0x7fff7fff;
and.b32 c, $3, 0x7fff7fff;
and.b32 d, $5, 0x7fff7fff;
min.NaN.bf16x2 a, a, b;
min.NaN.bf16x2 c, c, d;
prmt.b32 b, a, c, 0x5410;
prmt.b32 d, a, c, 0x7632;
min.NaN.bf16x2 a, b, d;
shl.b32 $0, a, 16;
and.b32 $1, a, 0xffff0000;
}""")
_PRUNED = tl.constexpr("""{
.reg .b32 least, a, b, zero;
mov.b32 zero, 0;
prmt.b32 least, $4, $4, 0x3232;
and.b32 a, $2, 0x7fff7fff;
and.b32 b, $3, 0x7fff7fff;
set.ge.bf16x2.bf16x2 a, a, least;
set.ge.bf16x2.bf16x2 b, b, least;
fma.rn.bf16x2 $0, $2, a, zero;
fma.rn.bf16x2 $1, $3, b, zero;
}""")


@triton.jit
def opened(words):
    """The four entries of each group, in float32: their bits are the upper ones of it."""
    low0, low1 = words[0] << 16, words[1] << 16
    high0, high1 = words[0] & -65536, words[1] & -65536
    x0, x1 = low0.to(tl.float32, bitcast=True), high0.to(tl.float32, bitcast=True)
    return x0, x1, low1.to(tl.float32, bitcast=True), high1.to(tl.float32, bitcast=True)


@triton.jit
def closed(entries):
    """The words of four entries, each rounded to bfloat16."""
    return _two(entries[0], entries[1]), _two(entries[2], entries[3])


@triton.jit
def _two(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def largest_three(words):
    """The three largest magnitudes of each group in float32, NaN where there is a NaN; for two groups a lane."""
    return tl.inline_asm_elementwise(
        _SORTED,
        "=f,=f,=f,=f,=f,=f,r,r,r,r",
        [words[0], words[1]],
        (tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=2,
    )


@triton.jit
def smallest(words):
    """The smallest magnitude, as :func:`largest_three`, with which it shares most instructions."""
    return tl.inline_asm_elementwise(_SMALLEST, "=f,=f,r,r,r,r", [words[0], words[1]], tl.float32, is_pure=True, pack=2)


@triton.jit
def without_smaller(words, least):
    """The words with +0.0 for entries below ``least`` and for -0.0."""
    return tl.inline_asm_elementwise(
        _PRUNED, "=&r,=&r,r,r,f", [words[0], words[1], least], (tl.int32, tl.int32), is_pure=True, pack=1
    )
