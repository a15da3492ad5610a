"""Round weights and inputs to 8 bits inside a forward pass; gradients pass as if nothing had been rounded.

The rounding is that of :mod:`~prox24_lightning.weights.rounding`, as operators that ``torch.compile`` does not open: it
would divide and round in its own way, and the result would not be that of a packed layer to the bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, library

from prox24_lightning.utils.devices.cuda import why_no_triton
from prox24_lightning.weights.chunks import CHUNK_ENTRIES, row_chunks
from prox24_lightning.weights.rounding import RoundedForm, expand_rows, round_rows_unchecked, round_tokens

_SCHEMA = "(Tensor tensor, str form, ScalarType dtype, ScalarType source) -> Tensor"
_INPUT_CHUNK = 16 * CHUNK_ENTRIES  # larger than that of weights: inputs are rounded in every call, launches cost


def round_matrix(weight: Tensor, form: RoundedForm, dtype: torch.dtype, source: torch.dtype | None = None) -> Tensor:
    """Return the (rows, columns) weight that ``form`` stores of ``weight``, expanded to ``dtype``.

    The gradient of ``weight`` is that of the result, clipped entries included. A row with NaN or inf becomes NaN.

    Args:
        weight: any strides; not changed.
        form: of 8 bits.
        dtype: of the result.
        source: cast the weight to this dtype before it is rounded; None rounds it as it is.
    """
    return _round_matrix(weight, form, dtype, source or weight.dtype)


def round_inputs(inputs: Tensor, form: RoundedForm, dtype: torch.dtype, source: torch.dtype | None = None) -> Tensor:
    """Return (..., in_features) inputs with each token rounded to ``form``; arguments as of :func:`round_matrix`."""
    return _round_inputs(inputs, form, dtype, source or inputs.dtype)


@library.custom_op("prox24::round_matrix", mutates_args=(), schema=_SCHEMA)
def _round_matrix(tensor: Tensor, form: str, dtype: torch.dtype, source: torch.dtype) -> Tensor:
    if _in_one_pass(tensor, dtype, source):
        from prox24_lightning.calibration.rounding_kernel import round_trip

        return round_trip(tensor, cast(RoundedForm, form), dtype, source, tokens=False)
    expanded = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for part in row_chunks(*tensor.shape):
        rows = round_rows_unchecked(tensor[part].to(source), cast(RoundedForm, form))
        expanded[part] = expand_rows(rows.values, rows.scales, dtype)
    return expanded


@library.custom_op("prox24::round_inputs", mutates_args=(), schema=_SCHEMA)
def _round_inputs(tensor: Tensor, form: str, dtype: torch.dtype, source: torch.dtype) -> Tensor:
    if _in_one_pass(tensor, dtype, source):
        from prox24_lightning.calibration.rounding_kernel import round_trip

        tokens = tensor.reshape(-1, tensor.shape[-1])
        return round_trip(tokens, cast(RoundedForm, form), dtype, source, tokens=True).view(tensor.shape)
    expanded = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    tokens, result = (one.reshape(-1, tensor.shape[-1]) for one in (tensor, expanded))
    for part in row_chunks(len(tokens), tensor.shape[-1], _INPUT_CHUNK):
        rows = round_tokens(tokens[part].to(source), cast(RoundedForm, form))
        result[part] = expand_rows(rows.values, rows.scales, dtype)
    return expanded


def _in_one_pass(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether a kernel rounds this tensor: a training step calls it for every layer, and launches cost."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    known = all(dtype in floats for dtype in (tensor.dtype, *dtypes))
    return tensor.is_cuda and known and why_no_triton(tensor.device) is None


def _like(tensor: Tensor, form: str, dtype: torch.dtype, source: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _remember_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return gradient.to(ctx.dtype), None, None, None


for _operator in (_round_matrix, _round_inputs):
    _operator.register_fake(_like)
    _operator.register_autograd(_straight_through, setup_context=_remember_dtype)
