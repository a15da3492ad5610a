"""Multiply tokens rounded to float8_e4m3 with a dense float8_e4m3 weight through ``torch._scaled_mm``.

The form that a layer takes without 2:4: one scale a row of the weight and one a token, rounding included. Its buffer is
a dense one (:func:`~prox24_lightning.convert.kernels.rounded_buffer.to_dense_buffer`). Run on compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.rounded_buffer import padded_shape
from prox24_lightning.weights.rounding import RoundedForm

OLDEST_CAPABILITY = (8, 9)

BY_ROWS, AFTERWARDS = 0, 1
"""The configuration: scales of rows and tokens inside of the product, or in a pass of their own over its bfloat16 sums.
The library's product without scales is the faster one for few tokens."""

WAYS = (BY_ROWS, AFTERWARDS)

_FORM: RoundedForm = "fp8_e4m3"


def prepare(
    config: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = _FORM,
) -> Product:
    """Return a product that takes a dense buffer in place of the packed one; its inputs are not padded.

    Args:
        config: one of :data:`WAYS`; empty for the first.
        dtype: float16 or bfloat16, of inputs and outputs.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: "fp8_e4m3".

    Raises:
        CudaError: if the kernel that rounds cannot be compiled or loaded here.
    """
    out_features, in_features = shape
    rows, columns = padded_shape(shape)
    afterwards = tuple(config) == (AFTERWARDS,)
    round_inputs = round_tokens.prepare(_FORM, dtype, in_features, columns, tokens, device)
    one = torch.ones((), device=torch.device("cuda", device))
    size = tokens * columns
    # The sums of a product without scales are as large as float16 cannot hold: they are bfloat16.
    scale = round_tokens.prepare_scaling(_FORM, torch.bfloat16, out_features, rows, tokens, device)

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        address = buffer.data_ptr()
        rounded = round_inputs(inputs, address + rows * columns + rows * 4)
        x = round_tokens.values_view(rounded, _FORM, tokens, columns)
        w = buffer[: rows * columns].view(torch.float8_e4m3fn).view(rows, columns).t()
        if afterwards:
            sums = torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
            addresses = rounded.data_ptr() + size, address + rows * columns
            out = scale(sums, *addresses, cast_bias(bias, torch.bfloat16))
            return out if dtype == torch.bfloat16 else out.to(dtype)
        token_scales = rounded[size:].view(torch.float32).view(tokens, 1)
        row_scales = buffer[rows * columns :].view(torch.float32)[:rows].view(1, rows)
        out = torch._scaled_mm(
            x, w, scale_a=token_scales, scale_b=row_scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        out = (out if rows == out_features else out[:, :out_features].contiguous()).to(dtype)
        return out if bias is None else out.add_(bias.to(dtype))

    return product
