"""Rounding of rows to 8 bits, under the name of the format's folder; see :mod:`prox24_lightning.weights.rounding`."""

from prox24_lightning.weights.rounding import (
    LARGEST,
    SMALLEST_SCALE,
    VALUE_DTYPES,
    RoundedForm,
    RoundedRows,
    WeightForm,
    expand_rows,
    round_rows,
    round_values,
    round_weight,
    rounded_form,
    row_scales,
)

__all__ = [
    "LARGEST",
    "SMALLEST_SCALE",
    "VALUE_DTYPES",
    "RoundedForm",
    "RoundedRows",
    "WeightForm",
    "expand_rows",
    "round_rows",
    "round_values",
    "round_weight",
    "rounded_form",
    "row_scales",
]
