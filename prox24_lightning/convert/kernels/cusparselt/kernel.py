"""Multiply with cuSPARSELt and a plan that is made once for each shape, bias and padded number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.cusparselt.bindings import TOKEN_MULTIPLE, CusparseltError, load, pad_tokens
from prox24_lightning.convert.kernels.cusparselt.plan import Plan
from prox24_lightning.convert.kernels.packed_buffer import padded_shape
from prox24_lightning.convert.kernels.product import Product

_PLANS = 4096  # kept at most: one for each layer with a bias (or shape without) and padded number of tokens


def prepare(config: Sequence[int], dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int) -> Product:
    """Return the product for one shape and number of tokens.

    Args:
        config: one number, the library's algorithm; empty for the library's default.
        dtype: float16 or bfloat16.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.

    Raises:
        CusparseltError: if the library cannot be used here.
    """
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


@lru_cache(maxsize=_PLANS)
def _plan(
    dtype: torch.dtype, shape: tuple[int, int], tokens: int, bias: int, algorithm: int | None, device: int
) -> Plan:
    library = load()
    try:
        return Plan(library, device, dtype, shape, tokens, bias, algorithm)
    except CusparseltError:
        if algorithm is None:
            raise
        # An algorithm was measured at one number of tokens, and need not take every other one.
        return Plan(library, device, dtype, shape, tokens, bias)
