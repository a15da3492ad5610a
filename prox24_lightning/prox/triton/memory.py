"""How the kernels reach a group of four in memory, its strength and its scales.

A group is held as words: its four entries in float32, or two pairs of bfloat16 entries (``bf16_pairs.py``).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.arguments import COLUMNS, Layout, Strides
from prox24_lightning.prox.triton.bf16_pairs import closed, opened
from prox24_lightning.prox.triton.interpreter import INTERPRETED

_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }"
)

_PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }")
_LINE = tl.constexpr(128)
"""Bytes that come from memory at a time."""


@triton.jit
def read_row(table, number, like):
    """Weight, scale, groups, programs, first program and layout of one of many weights of the dtype of ``like``."""
    row = table + number * COLUMNS
    weight = tl.multiple_of(tl.load(row).to(like.dtype, bitcast=True), 16)
    scale = tl.load(row + 1).to(tl.pointer_type(tl.float32), bitcast=True)
    groups, programs = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    length, inner = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    strides = Strides(tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32))
    first = tl.load(row + 9).to(tl.int32)
    return weight, scale, groups, programs, first, Layout(length, inner, strides, strides)


@triton.jit
def _parts(layout, begin, group, VARIANT: tl.constexpr):
    """The index of a group before, along and behind its dimension."""
    row, behind = begin + group, tl.zeros_like(begin + group)
    if not VARIANT.last_dim:
        number, inner = row, layout.inner
        row = number // inner
        behind = number - row * inner
    before = row // layout.length
    return before, row - before * layout.length, behind


@triton.jit
def _at(layout, begin, group, VARIANT: tl.constexpr):
    number = begin + group
    row = number // layout.inner
    behind = number - row * layout.inner
    if VARIANT.wide:
        row = row.to(tl.int64)
    return row * 4 * layout.inner + behind


@triton.jit
def load_groups(source, layout, begin, group, inside, VARIANT: tl.constexpr):
    """Load the words of each group."""
    if VARIANT.last_dim:
        words = words_of(load_rows(source, begin, group, inside, VARIANT), VARIANT)
    else:
        first = source + _at(layout, begin, group, VARIANT)
        inner = layout.inner
        x0, x1 = _load_entry(first, inside), _load_entry(first + inner, inside)
        x2, x3 = _load_entry(first + 2 * inner, inside), _load_entry(first + 3 * inner, inside)
        words = (x0, x1, x2, x3)
    return words


@triton.jit
def load_tile(source, begin, group, left, VARIANT: tl.constexpr):
    """As :func:`load_rows`, for a tile of which ``left`` groups exist; zeros for the others."""
    if left >= group.shape[0]:
        values = load_rows(source, begin, group, None, VARIANT)
    else:
        values = load_rows(source, begin, group, group < left, VARIANT)
    return values


@triton.jit
def fetch_tile(source, begin, left, TILE: tl.constexpr):
    """Ask for a tile of groups along the last dimension to be brought into the cache of the device."""
    if INTERPRETED:
        return
    size: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 2
    line = tl.arange(0, 32)
    place = (source + begin.to(tl.int64) * 4).to(tl.int64) + line * _LINE
    needed = line * _LINE < tl.minimum(left, TILE) * size
    tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [place, needed.to(tl.int32)], tl.int32, is_pure=False, pack=1)


@triton.jit
def store_tile(target, layout, begin, group, left, words, VARIANT: tl.constexpr):
    """As :func:`store_groups`, for a tile of which ``left`` groups exist."""
    if not VARIANT.last_dim:
        store_groups(target, layout, begin, group, group < left, words, VARIANT)
    elif left >= group.shape[0]:
        _store_rows(target, begin, group, None, words, VARIANT)
    else:
        _store_rows(target, begin, group, group < left, words, VARIANT)


@triton.jit
def load_rows(source, begin, group, inside, VARIANT: tl.constexpr):
    """Load groups along the last dimension as they are in memory, for :func:`words_of`."""
    if VARIANT.pairs:
        entries, offsets = source.to(tl.pointer_type(tl.int64), bitcast=True) + begin.to(tl.int64), group
    else:
        entries, offsets = source + begin.to(tl.int64) * 4, group[:, None] * 4 + tl.arange(0, 4)[None, :]
        if inside is not None:
            inside = inside[:, None]
    return tl.load(entries + offsets, mask=inside)


@triton.jit
def words_of(values, VARIANT: tl.constexpr):
    if VARIANT.pairs:
        words = (values.to(tl.int32), (values >> 32).to(tl.int32))
    else:
        even, odd = tl.split(tl.reshape(values.to(tl.float32), [values.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        words = (x0, x1, x2, x3)
    return words


@triton.jit
def entries_of(words, VARIANT: tl.constexpr):
    """The four entries of each group, in float32."""
    entries = words
    if VARIANT.pairs:
        entries = opened(words)
    return entries


@triton.jit
def as_words(entries, VARIANT: tl.constexpr):
    words = entries
    if VARIANT.pairs:
        words = closed(entries)
    return words


@triton.jit
def _load_entry(pointer, inside):
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointer.to(tl.pointer_type(tl.int16), bitcast=True), mask=inside, other=0)
        entry = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        entry = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    return entry


@triton.jit
def chosen(which, a, b, VARIANT: tl.constexpr):
    """The words ``a`` of some groups and ``b`` of the others."""
    words = (tl.where(which, a[0], b[0]), tl.where(which, a[1], b[1]))
    if not VARIANT.pairs:
        words = (words[0], words[1], tl.where(which, a[2], b[2]), tl.where(which, a[3], b[3]))
    return words


@triton.jit
def store_groups(target, layout, begin, group, inside, words, VARIANT: tl.constexpr):
    if VARIANT.vectors:
        # Not with two dimensions, for which Triton would give the group another layout, and work it out a second time.
        place = (target + (begin + group).to(tl.int64) * 4).to(tl.int64)
        operands = [place, words[0], words[1], words[2], words[3], inside.to(tl.int32)]
        tl.inline_asm_elementwise(_STORE, "=r,l,f,f,f,f,r", operands, tl.int32, is_pure=False, pack=1)
    elif VARIANT.last_dim:
        _store_rows(target, begin, group, inside, words, VARIANT)
    else:
        kind = target.dtype.element_ty
        first = target + _at(layout, begin, group, VARIANT)
        inner = layout.inner
        tl.store(first, words[0].to(kind), mask=inside)
        tl.store(first + inner, words[1].to(kind), mask=inside)
        tl.store(first + 2 * inner, words[2].to(kind), mask=inside)
        tl.store(first + 3 * inner, words[3].to(kind), mask=inside)


@triton.jit
def _store_rows(target, begin, group, inside, words, VARIANT: tl.constexpr):
    if VARIANT.wide:
        group = group.to(tl.int64)
    if VARIANT.pairs:
        entries, offsets = target.to(tl.pointer_type(tl.int64), bitcast=True) + begin.to(tl.int64), group
        values = words[0].to(tl.uint32, bitcast=True).to(tl.int64) | (words[1].to(tl.int64) << 32)
    else:
        entries, offsets = target + begin.to(tl.int64) * 4, group[:, None] * 4 + tl.arange(0, 4)[None, :]
        values = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
        values = tl.reshape(values, [group.shape[0], 4]).to(target.dtype.element_ty)
        if inside is not None:
            inside = inside[:, None]
    tl.store(entries + offsets, values, mask=inside)


@triton.jit
def coordinates(tensors, layout, begin, group, inside, VARIANT: tl.constexpr):
    """The strength and the four scales of each group; NaN where they are not allowed."""
    if VARIANT.one_strength:
        strength = tensors.strength + tl.zeros(group.shape, tl.float32)
    else:
        before, along, behind = _parts(layout, begin, group, VARIANT)
        strides = layout.strength_strides
        at = before * strides.before + along * strides.along + behind * strides.behind
        strength = tl.load(tensors.strength + at, mask=inside, other=0.0)
    strength = tl.where(strength >= 0, strength, float("nan"))
    c0, c1, c2, c3 = 1.0, 1.0, 1.0, 1.0
    if VARIANT.has_scale:
        before, along, behind = _parts(layout, begin, group, VARIANT)
        strides = layout.scale_strides
        first = tensors.scale + before * strides.before + along * 4 * strides.along + behind * strides.behind
        c0 = _allowed(tl.load(first, mask=inside, other=1.0))
        c1 = _allowed(tl.load(first + strides.along, mask=inside, other=1.0))
        c2 = _allowed(tl.load(first + 2 * strides.along, mask=inside, other=1.0))
        c3 = _allowed(tl.load(first + 3 * strides.along, mask=inside, other=1.0))
    return strength, c0, c1, c2, c3


@triton.jit
def _allowed(scale):
    return tl.where((scale > 0) & (scale < float("inf")), scale, float("nan"))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scaled(x0, x1, x2, x3, c0, c1, c2, c3, VARIANT: tl.constexpr):
    y0, y1, y2, y3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    if VARIANT.has_scale:
        y0, y1, y2, y3 = y0 * c0, y1 * c1, y2 * c2, y3 * c3
    return y0, y1, y2, y3
