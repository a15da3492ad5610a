"""Multiply with cuSPARSELt and a plan that is made once for each shape, bias and padded number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from prox24_lightning.convert.kernels import rounded_buffer
from prox24_lightning.convert.kernels.cusparselt.bindings import TOKEN_MULTIPLE, CusparseltError, load, pad_tokens
from prox24_lightning.convert.kernels.cusparselt.plan import Plan
from prox24_lightning.convert.kernels.packed_buffer import padded_shape
from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.weights.rounding import VALUE_DTYPES, RoundedForm

ROUNDED_TOKEN_MULTIPLE = 16
"""Tokens of 8 bits are padded to a multiple of this: the library takes rows of 16 bytes."""

_PLANS = 4096  # kept at most: one for each layer with a bias (or shape without) and padded number of tokens


def prepare(
    config: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> Product:
    """Return the product for one shape and number of tokens.

    Args:
        config: one number, the library's algorithm; empty for the library's default.
        dtype: float16 or bfloat16.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: of a weight of 8 bits; None for one in ``dtype``.

    Raises:
        CusparseltError: if the library cannot be used here.
        CudaError: if the kernels for the tokens of a weight of 8 bits cannot be compiled or loaded here.
    """
    if form is not None:
        return _prepare_rounded(config, dtype, shape, tokens, device, form)
    out_features = shape[0]
    rows, columns = padded_shape(shape)
    gpu = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream
    padded = -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    algorithm = config[0] if config else None
    plan_without_bias = _plan(dtype, (rows, columns), padded, 0, algorithm, device)

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = torch.empty((padded, rows), dtype=dtype, device=gpu)
        plan = plan_without_bias
        fused = bias is not None and bias.dtype == dtype and rows == out_features
        if bias is not None and fused:
            plan = _plan(dtype, (rows, columns), padded, bias.data_ptr(), algorithm, device)
        workspace_address = 0
        if plan.workspace_bytes:
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=gpu)
            workspace_address = workspace.data_ptr()
        inputs = pad_tokens(inputs, tokens)
        plan.run(buffer.data_ptr(), inputs.data_ptr(), out.data_ptr(), workspace_address, raw_stream(device))
        if rows != out_features:
            out = out[:, :out_features].contiguous()
        out = out if padded == tokens else out[:tokens]
        return out if bias is None or fused else out.add_(bias.to(dtype))

    return product


def _prepare_rounded(
    config: Sequence[int], dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int, form: RoundedForm
) -> Product:
    """Return the product of rounded tokens: the library's sums are scaled in a pass of their own.

    The library has no vector of scales for float8, and for int8 only one of the two.
    """
    out_features, in_features = shape
    rows, columns = rounded_buffer.padded_shape(shape)
    row_scales, given = rounded_buffer.places(shape).row_scales, rounded_buffer.places(shape).input_scale
    padded = -(-tokens // ROUNDED_TOKEN_MULTIPLE) * ROUNDED_TOKEN_MULTIPLE
    factor = rounded_factor(dtype)
    plan = _plan(dtype, (rows, columns), padded, 0, config[0] if config else None, device, VALUE_DTYPES[form], factor)
    round_inputs = round_tokens.prepare(form, dtype, in_features, columns, tokens, device)
    scale = round_tokens.prepare_scaling(form, dtype, out_features, rows, tokens, device, 1 / factor)
    gpu, raw_stream = torch.device("cuda", device), torch._C._cuda_getCurrentRawStream

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        address = buffer.data_ptr()
        rounded = round_inputs(inputs, address + given)
        values = rounded
        if padded != tokens:  # what the library makes of the rows behind the last token is not read
            values = torch.empty(padded * columns, dtype=torch.int8, device=gpu)
            values[: tokens * columns] = rounded[: tokens * columns]
        sums = torch.empty((padded, rows), dtype=dtype, device=gpu)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=gpu)
        plan.run(address, values.data_ptr(), sums.data_ptr(), workspace.data_ptr(), raw_stream(device))
        token_scales = rounded.data_ptr() + tokens * columns
        return scale(sums, token_scales, address + row_scales, cast_bias(bias, dtype))

    return product


def rounded_factor(dtype: torch.dtype) -> float:
    """Return what the library multiplies sums of 8-bit values by, so that ``dtype`` holds them."""
    return 2.0**-13 if dtype == torch.float16 else 1.0


@lru_cache(maxsize=_PLANS)
def _plan(
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    bias: int,
    algorithm: int | None,
    device: int,
    values: torch.dtype | None = None,
    factor: float = 1.0,
) -> Plan:
    library = load()
    try:
        return Plan(library, device, dtype, shape, tokens, bias, algorithm, values, factor)
    except CusparseltError:
        if algorithm is None:
            raise
        # An algorithm was measured at one number of tokens, and need not take every other one.
        return Plan(library, device, dtype, shape, tokens, bias, None, values, factor)
