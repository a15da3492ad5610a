"""A linear layer whose 2:4 weight is kept dense in float8, where that is the fastest form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24
from prox24_lightning.convert.kernels.rounded_buffer import from_dense_buffer, input_scale, to_dense_buffer
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.weights.rounding import RoundedForm, RoundedRows, expand_rows

FORM: RoundedForm = "fp8_e4m3"


class DenseFp8Linear(SemiStructuredLinear):
    """A linear layer in float8_e4m3 with a scale a row and a token, zeros and all; forward only.

    It has the values of a :class:`~prox24_lightning.convert.layers.semi_structured_linear.SemiStructuredLinear` in the
    form fp8_e4m3, is expanded to the same weight, and stored as the same packed file. ``packed`` is the dense buffer of
    :mod:`~prox24_lightning.convert.kernels.rounded_buffer`.

    Args:
        weight: the rounded weight, (out_features, in_features).
        dtype: float16 or bfloat16, of inputs and outputs.
        bias: (out_features,) in any floating dtype, or None.
        kernels: which of ``torch._scaled_mm``'s ways at which number of tokens
            (:attr:`~prox24_lightning.convert.autotune.kernel_table.KernelTable.dense_fp8_text`).
        transposed: see :class:`SemiStructuredLinear`.
        input_scale: see :class:`~prox24_lightning.convert.format.packed_weight.PackedWeight`.
    """

    def __init__(
        self,
        weight: RoundedRows,
        dtype: torch.dtype,
        bias: Tensor | None,
        kernels: str,
        transposed: type[Any] | None = None,
        input_scale: float | None = None,
    ) -> None:
        shape = weight.values.shape[0], weight.values.shape[1]
        buffer = to_dense_buffer(weight, input_scale)
        super().__init__(buffer, shape, dtype, bias, kernels, transposed=transposed, form=FORM)

    @property
    @override
    def packed_weight(self) -> PackedWeight:
        """The weight in the portable packed form, in tensors of its own."""
        return replace(pack_24(self.weight, form=FORM), input_scale=input_scale(self.packed))

    @override
    def _expanded(self) -> Tensor:
        rows = from_dense_buffer(self.packed, self._shape, FORM)
        return expand_rows(rows.values, rows.scales, self.dtype)

    @property
    @override
    def _stored_as(self) -> str:
        return f"dense {super()._stored_as}"
