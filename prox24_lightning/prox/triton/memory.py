"""How the kernels reach a group of four in memory, its strength and its scales.

``shape`` is (groups along the dimension, entries behind it, strides of the strength, strides of the scale), the strides
each before, along and behind the dimension. ``KIND`` is (one strength, has scale, groups along the last dimension,
64-bit addresses, settle only, words that are pairs as in ``triton_pairs.py``, look at the results, groups along the
last dimension of float32 that are aligned).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from prox24_lightning.prox.triton.bf16_pairs import closed, opened

SIZES = ["groups", "chunk", "programs", "length", "samples"]
SIZES += [f"{tensor}_{where}" for tensor in ("strength", "scale") for where in ("before", "along", "behind")]
"""Arguments of kernels that are not worth a variant of their own where they are 1 or divide by 16."""

_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }"
)

_PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }")
_LINE = tl.constexpr(128)
"""Bytes that come from memory at a time."""


@triton.jit
def read_row(table, number, like):
    """Weight, scale, groups, programs, and shape of one of many weights of the dtype of ``like``."""
    row = table + number * 10
    weight = tl.multiple_of(tl.load(row).to(like.dtype, bitcast=True), 16)
    scale = tl.load(row + 1).to(tl.pointer_type(tl.float32), bitcast=True)
    groups, programs = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    length, inner = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    strides = (tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32))
    return weight, scale, groups, programs, (length, inner, strides, strides)


@triton.jit
def _parts(shape, begin, group, KIND: tl.constexpr):
    """Where a group is before, along and behind its dimension."""
    row, behind = begin + group, tl.zeros_like(begin + group)
    if not KIND[2]:
        number, inner = row, shape[1]
        row = number // inner
        behind = number - row * inner
    before = row // shape[0]
    return before, row - before * shape[0], behind


@triton.jit
def _at(shape, begin, group, KIND: tl.constexpr):
    number = begin + group
    row = number // shape[1]
    behind = number - row * shape[1]
    if KIND[3]:
        row = row.to(tl.int64)
    return row * 4 * shape[1] + behind


@triton.jit
def load_groups(source, shape, begin, group, inside, KIND: tl.constexpr):
    """The words of each group: two pairs, or its four entries in float32."""
    if KIND[2]:
        words = words_of(load_rows(source, begin, group, inside, KIND), KIND)
    else:
        first = source + _at(shape, begin, group, KIND)
        inner = shape[1]
        x0, x1 = _load_entry(first, inside), _load_entry(first + inner, inside)
        x2, x3 = _load_entry(first + 2 * inner, inside), _load_entry(first + 3 * inner, inside)
        words = (x0, x1, x2, x3)
    return words


@triton.jit
def load_tile(source, begin, group, left, KIND: tl.constexpr):
    """As :func:`load_rows`, all groups of a tile of which ``left`` exist, and zeros."""
    if left >= group.shape[0]:
        values = load_rows(source, begin, group, None, KIND)
    else:
        values = load_rows(source, begin, group, group < left, KIND)
    return values


@triton.jit
def fetch_tile(source, begin, left, TILE: tl.constexpr):
    """Have a tile of groups along the last dimension brought into the cache of the device."""
    size: tl.constexpr = source.dtype.element_ty.primitive_bitwidth // 2
    line = tl.arange(0, 32)
    place = (source + begin.to(tl.int64) * 4).to(tl.int64) + line * _LINE
    needed = line * _LINE < tl.minimum(left, TILE) * size
    tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [place, needed.to(tl.int32)], tl.int32, is_pure=False, pack=1)


@triton.jit
def store_tile(target, shape, begin, group, left, words, KIND: tl.constexpr):
    """As :func:`store_groups`, those of a tile that exist."""
    if not KIND[2]:
        store_groups(target, shape, begin, group, group < left, words, KIND)
    elif left >= group.shape[0]:
        _store_rows(target, begin, group, None, words, KIND)
    else:
        _store_rows(target, begin, group, group < left, words, KIND)


@triton.jit
def load_rows(source, begin, group, inside, KIND: tl.constexpr):
    """Groups along the last dimension as they are in memory, for :func:`words_of`."""
    if KIND[5]:
        entries, offsets = source.to(tl.pointer_type(tl.int64), bitcast=True) + begin.to(tl.int64), group
    else:
        entries, offsets = source + begin.to(tl.int64) * 4, group[:, None] * 4 + tl.arange(0, 4)[None, :]
        if inside is not None:
            inside = inside[:, None]
    return tl.load(entries + offsets, mask=inside)


@triton.jit
def words_of(values, KIND: tl.constexpr):
    if KIND[5]:
        words = (values.to(tl.int32), (values >> 32).to(tl.int32))
    else:
        even, odd = tl.split(tl.reshape(values.to(tl.float32), [values.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        words = (x0, x1, x2, x3)
    return words


@triton.jit
def entries_of(words, KIND: tl.constexpr):
    """The four entries of each group, in float32."""
    entries = words
    if KIND[5]:
        entries = opened(words)
    return entries


@triton.jit
def as_words(entries, KIND: tl.constexpr):
    words = entries
    if KIND[5]:
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
def chosen(which, a, b, KIND: tl.constexpr):
    """The words ``a`` of some groups and ``b`` of the others."""
    words = (tl.where(which, a[0], b[0]), tl.where(which, a[1], b[1]))
    if not KIND[5]:
        words = (words[0], words[1], tl.where(which, a[2], b[2]), tl.where(which, a[3], b[3]))
    return words


@triton.jit
def store_groups(target, shape, begin, group, inside, words, KIND: tl.constexpr):
    if KIND[7]:
        # Not with two dimensions, for which Triton would give the group another layout, and work it out a second time.
        place = (target + (begin + group).to(tl.int64) * 4).to(tl.int64)
        operands = [place, words[0], words[1], words[2], words[3], inside.to(tl.int32)]
        tl.inline_asm_elementwise(_STORE, "=r,l,f,f,f,f,r", operands, tl.int32, is_pure=False, pack=1)
    elif KIND[2]:
        _store_rows(target, begin, group, inside, words, KIND)
    else:
        kind = target.dtype.element_ty
        first = target + _at(shape, begin, group, KIND)
        inner = shape[1]
        tl.store(first, words[0].to(kind), mask=inside)
        tl.store(first + inner, words[1].to(kind), mask=inside)
        tl.store(first + 2 * inner, words[2].to(kind), mask=inside)
        tl.store(first + 3 * inner, words[3].to(kind), mask=inside)


@triton.jit
def _store_rows(target, begin, group, inside, words, KIND: tl.constexpr):
    if KIND[3]:
        group = group.to(tl.int64)
    if KIND[5]:
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
def coordinates(tensors, shape, begin, group, inside, KIND: tl.constexpr):
    """The strength and the four scales of each group; NaN where they are not allowed. Where there is one strength,
    ``tensors`` holds it rather than its place: nothing then has to be loaded again after a store."""
    if KIND[0]:
        lam = tensors[2] + tl.zeros(group.shape, tl.float32)
    else:
        before, along, behind = _parts(shape, begin, group, KIND)
        strides = shape[2]
        at = before * strides[0] + along * strides[1] + behind * strides[2]
        lam = tl.load(tensors[2] + at, mask=inside, other=0.0)
    lam = tl.where(lam >= 0, lam, float("nan"))
    c0, c1, c2, c3 = 1.0, 1.0, 1.0, 1.0
    if KIND[1]:
        before, along, behind = _parts(shape, begin, group, KIND)
        strides = shape[3]
        first = tensors[3] + before * strides[0] + along * 4 * strides[1] + behind * strides[2]
        c0 = _allowed(tl.load(first, mask=inside, other=1.0))
        c1 = _allowed(tl.load(first + strides[1], mask=inside, other=1.0))
        c2 = _allowed(tl.load(first + 2 * strides[1], mask=inside, other=1.0))
        c3 = _allowed(tl.load(first + 3 * strides[1], mask=inside, other=1.0))
    return lam, c0, c1, c2, c3


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
def scaled(x0, x1, x2, x3, c0, c1, c2, c3, KIND: tl.constexpr):
    y0, y1, y2, y3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    if KIND[1]:
        y0, y1, y2, y3 = y0 * c0, y1 * c1, y2 * c2, y3 * c3
    return y0, y1, y2, y3
