"""Round the rows of a weight to 8 bits with one scale each, and expand them again.

A row ``w`` becomes 8-bit ``values`` and a float32 ``scale`` with ``w ~ values * scale``: float8_e4m3fn (three bits of
mantissa, up to 448) or symmetric int8 (up to 127). The scale is the row's largest magnitude over the form's largest
value, rounded up to 16 significant bits. The product of value and scale is then exact in float32, so every device
expands to the same bits, and rounding a rounded row again changes nothing: a rounded weight can be stored dense.
:func:`round_tokens` does the same to a layer's inputs, as the kernels for rounded weights do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prox24_lightning.weights.chunks import row_chunks

WeightForm = Literal["bf16", "fp16", "fp8_e4m3", "int8"]
"""How the values of a packed weight are stored."""

RoundedForm = Literal["fp8_e4m3", "int8"]
"""The forms of 8 bits, which have a scale for each row."""

VALUE_DTYPES: dict[WeightForm, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""The dtype of a form's values."""

LARGEST: dict[RoundedForm, float] = {"fp8_e4m3": 448.0, "int8": 127.0}
"""The largest value of each rounded form."""

SMALLEST_SCALE = 2.0**-100
"""Scales of rows of very small weights; below, products with a value would leave float32's normal range."""

_DROPPED_BITS = 8  # of float32's 24 significant ones: 16 and the 8 of a value make an exact product


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """A rounded weight.

    Attributes:
        values: (rows, columns) in the form's dtype.
        scales: float32 (rows,), finite and positive; 1 for a row of zeros.
    """

    values: Tensor
    scales: Tensor


def round_rows(weight: Tensor, form: RoundedForm, *, name: str = "weight", first_row: int = 0) -> RoundedRows:
    """Round each row to the nearest values of ``form``, ties to even.

    Args:
        weight: (rows, columns), floating point, any device and strides; not changed.
        form: of the values.
        name: of the layer, for errors.
        first_row: number of the first row, for errors.

    Raises:
        ValueError: for NaN, inf, or a magnitude beyond float32's range, with the layer's name and the row.
    """
    return _rounded(weight, row_scales(weight, form, name=name, first_row=first_row), form)


def round_rows_unchecked(weight: Tensor, form: RoundedForm) -> RoundedRows:
    """Round as :func:`round_rows`, but a row that cannot be rounded becomes NaN, and no GPU waits for the answer."""
    return _rounded(weight, scales_of(_magnitudes(weight), form), form)


def _rounded(weight: Tensor, scales: Tensor, form: RoundedForm) -> RoundedRows:
    values = round_values(weight, scales, form)
    if weight.dtype == torch.float16:
        # Small products are coarse or zero in float16: take the values that the expanded row rounds to.
        values = round_values(expand_rows(values, scales, weight.dtype), scales, form)
    empty = ~(values.view(torch.int8) & 127).any(-1) if weight.shape[1] else torch.ones_like(scales, dtype=torch.bool)
    return RoundedRows(values, scales.masked_fill(empty & torch.isfinite(scales), 1))


def _magnitudes(weight: Tensor) -> Tensor:
    """Return the float32 (rows,) largest magnitude of each row."""
    rows, columns = weight.shape
    return weight.detach().abs().amax(-1).float() if columns else weight.new_zeros(rows, dtype=torch.float32)


def row_scales(weight: Tensor, form: RoundedForm, *, name: str = "weight", first_row: int = 0) -> Tensor:
    """Return the float32 (rows,) scales of :func:`round_rows`: at least :data:`SMALLEST_SCALE`.

    Raises:
        ValueError: as :func:`round_rows`.
    """
    magnitudes = _magnitudes(weight)
    scales = scales_of(magnitudes, form)
    wrong = ~(torch.isfinite(magnitudes) & torch.isfinite(scales * LARGEST[form]))
    if wrong.any():
        row = int(torch.nonzero(wrong)[0])
        raise ValueError(
            f"{name}: row {first_row + row} holds NaN, inf or a value beyond float32, which {form} cannot hold: mend "
            "the weight, or leave this layer dense"
        )
    return scales


def scales_of(magnitudes: Tensor, form: RoundedForm) -> Tensor:
    """Return the scales of rows with these float32 (rows,) largest magnitudes; nothing is checked, no GPU waits."""
    # By a tensor: by a number CUDA multiplies with the rounded reciprocal, and a rounded row would find another scale.
    bits = (magnitudes / torch.full_like(magnitudes, LARGEST[form])).view(torch.int32)
    lowest = (1 << _DROPPED_BITS) - 1
    return (bits + lowest & ~lowest).view(torch.float32).clamp_min(SMALLEST_SCALE)


def round_values(weight: Tensor, scales: Tensor, form: RoundedForm) -> Tensor:
    """Return the nearest values of ``form`` to ``weight / scales``; what exceeds the form's range is clamped.

    Args:
        weight: (rows, columns), floating point and finite.
        scales: float32 (rows,).
        form: of the values.
    """
    quotients = (weight.detach().float() / scales.unsqueeze(-1)).clamp_(-LARGEST[form], LARGEST[form])
    return (quotients.round_() if form == "int8" else quotients).to(VALUE_DTYPES[form])


def expand_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values * scales``, rounded once to ``dtype``; undoes :func:`round_rows`.

    Args:
        values: (rows, columns) in 8 bits.
        scales: float32 (rows,).
        dtype: of the dense weight.
    """
    return (values.float() * scales.unsqueeze(-1)).to(dtype)


def round_weight(weight: Tensor, form: RoundedForm, *, name: str = "weight") -> Tensor:
    """Return the dense weight that ``form`` stores of ``weight``, some rows at a time.

    Args:
        weight: (rows, columns), floating point.
        form: see :func:`round_rows`.
        name: of the layer, for errors.

    Raises:
        ValueError: as :func:`round_rows`.
    """
    rounded = torch.empty_like(weight, requires_grad=False)
    for part in row_chunks(*weight.shape):
        rows = round_rows(weight[part], form, name=name, first_row=part.start)
        rounded[part] = expand_rows(rows.values, rows.scales, weight.dtype)
    return rounded


def round_tokens(inputs: Tensor, form: RoundedForm, scale: float | None = None) -> RoundedRows:
    """Round each token to the nearest values of ``form``, ties to even: ``inputs ~ values * scales``.

    Args:
        inputs: (tokens, in_features), floating point.
        form: of the values.
        scale: of all tokens; None gives each token its largest magnitude over the form's largest value. What exceeds
            the range of a given scale is clamped.

    Returns:
        Values and float32 (tokens,) scales. A token with NaN or inf has a scale of NaN or inf: its products are NaN.
    """
    largest = LARGEST[form]
    scales = _magnitudes(inputs) * torch.tensor(1 / largest, dtype=torch.float32)
    if scale is not None:
        scales = torch.where(torch.isfinite(scales), torch.full_like(scales, scale), scales)
    scales = scales.clamp_min(SMALLEST_SCALE)
    quotients = (inputs.float() * (1 / scales).unsqueeze(-1)).clamp(-largest, largest)
    values = quotients.nan_to_num(0).round() if form == "int8" else quotients
    return RoundedRows(values.to(VALUE_DTYPES[form]), scales)


def rounded_form(dtype: torch.dtype) -> RoundedForm:
    """Return the form whose values are of ``dtype``.

    Raises:
        TypeError: for another dtype.
    """
    if dtype == torch.float8_e4m3fn:
        return "fp8_e4m3"
    if dtype == torch.int8:
        return "int8"
    raise TypeError(f"{dtype} is not the dtype of a rounded form, only torch.float8_e4m3fn and torch.int8")
