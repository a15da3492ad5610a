"""Multiply a few tokens with a packed weight: a product bound by reading the weight; see ``kernel.cu``.

The kernel reads 0.5625 of the bytes that a dense one reads (0.625 in 8 bits), and the sparse tensor cores multiply them
as they are. The inputs of a weight of 8 bits are rounded by a kernel before it. int8 has been run on compute capability
9.0, and only compiled for 8.0, 8.6 and 8.9; float8 has only been compiled, for 8.9.
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

from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.few_tokens.tiling import Tiling
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.round_tokens.kernel import OVERLAPPING, form_macro
from prox24_lightning.weights.rounding import RoundedForm

SOURCE = Path(__file__).with_name("kernel.cu")


class _Parameters(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "row_scales", "token_scales", "bias", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs")),
    )


@cache
def compile_few_tokens(
    tiling: Tiling, dtype: torch.dtype, capability: tuple[int, int], form: RoundedForm | None = None
) -> bytes:
    """Return the machine code of a tiling, kept for the process; several threads may compile at once."""
    macros = {**tiling.macros, "BF16": int(dtype == torch.bfloat16), "FORM": form_macro(form)}
    return compile_program(SOURCE.read_text(), macros, capability)


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
        config: the fields of a :class:`~prox24_lightning.convert.kernels.few_tokens.tiling.Tiling`.
        dtype: float16 or bfloat16, of inputs and outputs.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: of a weight of 8 bits; None for one in ``dtype``.

    Raises:
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    tiling = Tiling(*config)
    out_features = shape[0]
    if form is None:
        rows, words = packed_buffer.padded_shape(shape)
    else:
        rows, columns = rounded_buffer.padded_shape(shape)
        words = columns // 2
        places = rounded_buffer.places(shape)
        round_inputs = round_tokens.prepare(form, dtype, shape[1], columns, tokens, device)
    gpu = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream
    launch = _function(tiling, dtype, device, form)
    grid = -(-rows // tiling.rows), tiling.cluster, -(-tokens // tiling.tokens)

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = torch.empty(
            (*inputs.shape[:-1], out_features) if form is None else (tokens, out_features), dtype=dtype, device=gpu
        )
        bias_address = 0
        if bias is not None:
            bias = bias if bias.dtype == dtype else bias.to(dtype)
            bias_address = bias.data_ptr()
        address, x, scales = buffer.data_ptr(), inputs.data_ptr(), (0, 0)
        if form is not None:
            rounded = round_inputs(inputs, address + places.input_scale)
            x = rounded.data_ptr()
            scales = address + places.row_scales, x + tokens * columns
        launch(
            *(grid, raw_stream(device), x, address, *scales, bias_address, out.data_ptr()),
            *(tokens, rows, words, out_features),
        )
        return out

    return product


@cache
def _function(tiling: Tiling, dtype: torch.dtype, device: int, form: RoundedForm | None) -> CudaFunction:
    capability = torch.cuda.get_device_capability(device)
    code = compile_few_tokens(tiling, dtype, capability, form)
    early = form is not None and capability >= OVERLAPPING
    with torch.cuda.device(device):
        return CudaFunction(code, "few_tokens", _Parameters, tiling.threads, tiling.shared_bytes, early=early)
