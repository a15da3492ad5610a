"""Round rows to 8 bits and expand them again in one pass of a GPU: the equations of ``weights/rounding.py``."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.weights.rounding import LARGEST, SMALLEST_SCALE, RoundedForm

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LONGEST_BLOCK = 4096
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_SMALLEST_QUANTUM = tl.constexpr(2.0**-6)  # below, float8_e4m3fn is spaced as at its smallest normal number
_INTEGERS_BEGIN = tl.constexpr(1.5 * 2.0**23)  # added and taken away again, it rounds to an integer, ties to even


def round_trip(rows: Tensor, form: RoundedForm, dtype: torch.dtype, source: torch.dtype, *, tokens: bool) -> Tensor:
    """Return (rows, columns) ``rows``, cast to ``source`` and rounded to ``form``, expanded to ``dtype``.

    The result is that of :func:`~prox24_lightning.weights.rounding.round_tokens` (``tokens``) or
    :func:`~prox24_lightning.weights.rounding.round_rows_unchecked`, and
    :func:`~prox24_lightning.weights.rounding.expand_rows`, to the bit.

    Args:
        rows: on a CUDA device, any strides; this and the other dtypes are float32, bfloat16 or float16.
        form: of 8 bits.
        dtype: of the result.
        source: dtype that is rounded.
        tokens: take the scales of tokens, not those of a weight's rows.
    """
    count, columns = rows.shape
    result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    if result.numel():
        block = min(triton.next_power_of_2(columns), _LONGEST_BLOCK)
        with torch.cuda.device_of(rows):
            _round_trip_kernel[(count,)](
                rows,
                result,
                *rows.stride(),
                COLUMNS=columns,
                LARGEST=LARGEST[form],
                INTEGERS=form == "int8",
                TOKENS=tokens,
                SOURCE=_TRITON[source],
                BLOCK=block,
                num_warps=4 if block <= 2048 else 8,
            )
    return result


@triton.jit
def _round_trip_kernel(
    rows,
    result,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGERS: tl.constexpr,
    TOKENS: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for begin in range(0, COLUMNS, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        entry = _read(rows, row, at, COLUMNS, row_stride, column_stride, SOURCE)
        largest = tl.maximum(largest, tl.abs(entry))
        finite = tl.minimum(finite, (tl.abs(entry) < float("inf")).to(tl.int32))
    scale = _scale(tl.max(largest, 0), LARGEST, TOKENS)
    scale = tl.where(tl.min(finite, 0) == 1, scale, float("nan"))
    for begin in range(0, COLUMNS, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        entry = _read(rows, row, at, COLUMNS, row_stride, column_stride, SOURCE)
        value = _nearest(entry, scale, LARGEST, INTEGERS, TOKENS)
        if not TOKENS and tl.float16 == SOURCE:
            # Small products are coarse or zero in float16: take the values that the expanded row rounds to.
            value = _nearest((value * scale).to(tl.float16).to(tl.float32), scale, LARGEST, INTEGERS, TOKENS)
        expanded = (value * scale).to(result.dtype.element_ty)
        tl.store(result + row * COLUMNS + at, expanded, mask=at < COLUMNS)


@triton.jit
def _read(rows, row, at, COLUMNS, row_stride, column_stride, SOURCE: tl.constexpr):
    """Entries of a row, cast to ``SOURCE``, in float32; 0 beyond its end."""
    entry = tl.load(rows + row * row_stride + at.to(tl.int64) * column_stride, mask=at < COLUMNS, other=0)
    return entry.to(SOURCE).to(tl.float32)


@triton.jit
def _scale(largest, LARGEST: tl.constexpr, TOKENS: tl.constexpr):
    """The scale of a token, or of a weight's row, rounded up to 16 bits, from its largest magnitude."""
    if TOKENS:
        scale = largest * (1.0 / LARGEST)
    else:
        bits = tl.div_rn(largest, tl.full([], LARGEST, tl.float32)).to(tl.int32, bitcast=True)
        scale = ((bits + 255) & -256).to(tl.float32, bitcast=True)
    return tl.maximum(scale, _SMALLEST_SCALE)


@triton.jit
def _nearest(entry, scale, LARGEST: tl.constexpr, INTEGERS: tl.constexpr, TOKENS: tl.constexpr):
    """The nearest value of the form to ``entry / scale``, ties to even, in float32."""
    scales = tl.zeros_like(entry) + scale
    ones = tl.full(entry.shape, 1.0, tl.float32)
    quotient = entry * tl.div_rn(ones, scales) if TOKENS else tl.div_rn(entry, scales)
    quotient = tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST)
    if INTEGERS:
        return (quotient + _INTEGERS_BEGIN) - _INTEGERS_BEGIN
    # The power of two below the quotient has eight steps to the next one; both are exact to divide by.
    bits = quotient.to(tl.int32, bitcast=True)
    power = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), _SMALLEST_QUANTUM)
    inverse = (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    steps = (quotient * (inverse * 8) + _INTEGERS_BEGIN) - _INTEGERS_BEGIN
    rounded = tl.abs(steps * (power * 0.125)).to(tl.int32, bitcast=True)
    return (rounded | (bits & -2147483648)).to(tl.float32, bitcast=True)  # a negative value of 0 stays negative
