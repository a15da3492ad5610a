"""Expand a packed weight on the GPU to the dense one, alone or followed by cuBLAS; see ``kernel.cu``.

The plain-torch version is :func:`prox24_lightning.convert.kernels.reference.expand`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.round_tokens.kernel import form_macro
from prox24_lightning.weights.rounding import RoundedForm

SOURCE = Path(__file__).with_name("kernel.cu")

_THREADS = 256
_INPUTS_A_BLOCK = 4 * _THREADS  # a thread writes a group of four


class _Parameters(Structure):
    _fields_ = (("packed", c_void_p), ("dense", c_void_p), ("rows", c_int), ("columns", c_int))


def expand(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype, form: RoundedForm | None = None) -> Tensor:
    """Return the dense (out_features, in_features) weight of a packed buffer on a GPU, exactly.

    A weight of 8 bits (``form``) is the product of value and scale, rounded once to ``dtype``.
    """
    rows, columns = _padded_shape(shape, form)
    dense = torch.empty(rows, columns, dtype=dtype, device=buffer.device)
    device = buffer.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        launch = _function(device, dtype, form)
        launch(_grid(rows, columns), stream, buffer.data_ptr(), dense.data_ptr(), rows, columns)
    return dense[: shape[0], : shape[1]]


def prepare(
    config: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> Product:
    """Return a product that expands the weight at every call and multiplies with cuBLAS; ``config`` is empty.

    The inputs of a weight of 8 bits (``form``) are not rounded, nor padded.

    Raises:
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    out_features, in_features = shape
    rows, columns = _padded_shape(shape, form)
    gpu = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream
    launch, grid = _function(device, dtype, form), _grid(rows, columns)

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dense = torch.empty((rows, columns), dtype=dtype, device=gpu)
        launch(grid, raw_stream(device), buffer.data_ptr(), dense.data_ptr(), rows, columns)
        if columns != in_features:
            inputs, dense = inputs[:, :in_features], dense[:, :in_features]
        return F.linear(inputs, dense[:out_features], cast_bias(bias, dtype))

    return product


def _grid(rows: int, columns: int) -> tuple[int, int, int]:
    """Blocks for a weight of this padded shape."""
    return rows, -(-columns // _INPUTS_A_BLOCK), 1


def _padded_shape(shape: tuple[int, int], form: RoundedForm | None) -> tuple[int, int]:
    return packed_buffer.padded_shape(shape) if form is None else rounded_buffer.padded_shape(shape)


@cache
def _function(device: int, dtype: torch.dtype, form: RoundedForm | None) -> CudaFunction:
    macros = {"FORM": form_macro(form), "BF16": int(dtype == torch.bfloat16)}
    code = compile_program(SOURCE.read_text(), macros, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return CudaFunction(code, "expand", _Parameters, _THREADS)
