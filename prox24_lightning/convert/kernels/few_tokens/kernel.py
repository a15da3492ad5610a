"""Multiply a few tokens with a packed weight: a product bound by reading the weight; see ``kernel.cu``.

The kernel reads 0.5625 of the bytes that a dense one reads, and the sparse tensor cores multiply them as they are.
Which :class:`.tiling.Tiling` is fastest depends on the shape and is measured
(:mod:`~prox24_lightning.convert.autotune.tune`). The plain-torch version is
:func:`prox24_lightning.convert.kernels.reference.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.few_tokens.tiling import Tiling
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.packed_buffer import padded_shape
from prox24_lightning.convert.kernels.product import Product

SOURCE = Path(__file__).with_name("kernel.cu")


class _Parameters(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "bias", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs")),
    )


@cache
def compile_few_tokens(tiling: Tiling, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
    """Return the machine code of a tiling, kept for the process; several threads may compile at once."""
    return compile_program(SOURCE.read_text(), {**tiling.macros, "BF16": int(dtype == torch.bfloat16)}, capability)


def prepare(config: Sequence[int], dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int) -> Product:
    """Return the product for one shape and number of tokens.

    Args:
        config: the fields of a :class:`~prox24_lightning.convert.kernels.few_tokens.tiling.Tiling`.
        dtype: float16 or bfloat16.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.

    Raises:
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    tiling = Tiling(*config)
    out_features = shape[0]
    rows, columns = padded_shape(shape)
    gpu = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream
    launch = _function(tiling, dtype, device)
    grid = -(-rows // tiling.rows), tiling.cluster, -(-tokens // tiling.tokens)

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = torch.empty((tokens, out_features), dtype=dtype, device=gpu)
        bias_address = 0
        if bias is not None:
            bias = bias if bias.dtype == dtype else bias.to(dtype)
            bias_address = bias.data_ptr()
        launch(
            *(grid, raw_stream(device), inputs.data_ptr(), buffer.data_ptr(), bias_address, out.data_ptr()),
            *(tokens, rows, columns, out_features),
        )
        return out

    return product


@cache
def _function(tiling: Tiling, dtype: torch.dtype, device: int) -> CudaFunction:
    code = compile_few_tokens(tiling, dtype, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return CudaFunction(code, "few_tokens", _Parameters, tiling.threads, tiling.shared_bytes)
