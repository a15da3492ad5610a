"""Multiply many tokens with a packed weight of 8 bits on Hopper; see ``kernel.cu``.

These products are bound by the sparse tensor cores and by the memory that feeds them. The blocks stay, take one tile
after the other, and scale their sums before they store them, which a library does not: cuSPARSELt leaves the scales to
another pass over the result. The plain-torch version is :func:`prox24_lightning.convert.kernels.reference.linear`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.many_tokens.tiling import CAPABILITY, Tiling
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.round_tokens.kernel import form_macro
from prox24_lightning.convert.kernels.rounded_buffer import padded_shape, places
from prox24_lightning.convert.kernels.warpgroup.kernel import program_text
from prox24_lightning.convert.kernels.warpgroup.tensor_map import TensorMap, encode_tensor_map
from prox24_lightning.weights.rounding import RoundedForm

SOURCE = Path(__file__).with_name("kernel.cu")

_MAPS = 4096  # kept at most
_CHUNK = 64  # tokens that are stored at a time
_VALUE_WORDS = 32  # words of 16 bits that a row of a piece has of values; of inputs and results it has 64
_METADATA_ENTRIES = 128  # of eight bytes that a piece has for 64 rows
_ALIGNED_OUTPUTS = 8  # the copy engine stores rows of 16 bytes
_ALIGNED_INPUTS = 8  # a lane of the product's warps that round loads 16 bytes


class _Parameters(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("values", "inputs", "metadata", "results")),
        *((name, c_void_p) for name in ("row_scales", "bias", "x", "given", "rounded", "token_scales", "counters")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs", "width", "ready")),
    )


@cache
def compile_many_tokens(tiling: Tiling, dtype: torch.dtype, form: RoundedForm) -> bytes:
    """Return the machine code of a tiling, kept for the process; several threads may compile at once."""
    text = program_text(SOURCE, tiling.tokens, dtype, form)
    macros = {**tiling.macros, "BF16": int(dtype == torch.bfloat16), "FORM": form_macro(form)}
    return compile_program(text, macros, CAPABILITY, all_features=True)


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
        config: the fields of a :class:`~prox24_lightning.convert.kernels.many_tokens.tiling.Tiling`; without the last
            one all tokens are rounded before the product.
        dtype: float16 or bfloat16, of inputs and outputs.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: of the weight; there is no such kernel for 16 bits.

    Raises:
        ValueError: without a form.
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    if form is None:
        raise ValueError("this kernel multiplies weights of 8 bits only")
    tiling = Tiling(*config)
    out_features, in_features = shape
    rows, columns = padded_shape(shape)
    at = places(shape)
    width = out_features if out_features % _ALIGNED_OUTPUTS == 0 else rows
    gpu, raw_stream = torch.device("cuda", device), torch._C._cuda_getCurrentRawStream
    launch = _function(tiling, dtype, device, form)
    clusters = torch.cuda.get_device_properties(device).multi_processor_count // tiling.across
    row_tiles, token_tiles = -(-rows // (tiling.rows * tiling.across)), -(-tokens // tiling.tokens)
    grid = min(clusters, row_tiles * token_tiles) * tiling.across, 1, 1
    share = tiling.tokens // tiling.across
    ready, counters = tokens, 0
    if tiling.beside and in_features % _ALIGNED_INPUTS == 0:
        ready, counters = min(tokens, tiling.first_tokens(row_tiles, clusters)), 1 + token_tiles
    round_inputs = round_tokens.prepare(
        form, dtype, in_features, columns, tokens, device, first=ready, counters=counters
    )

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = torch.empty((tokens, width), dtype=dtype, device=gpu)
        bias = cast_bias(bias, dtype)
        address = buffer.data_ptr()
        given = address + at.input_scale
        rounded = round_inputs(inputs, given)
        x = rounded.data_ptr()
        token_scales = x + tokens * columns
        launch(
            *(grid, raw_stream(device)),
            _map(address, rows, columns // 4, tiling.rows, _VALUE_WORDS),
            _map(x, tokens, columns // 2, share),
            _map(address + at.metadata, rows // 64, columns, tiling.groups, _METADATA_ENTRIES, 8),
            _map(out.data_ptr(), tokens, width, _CHUNK),
            *(address + at.row_scales, 0 if bias is None else bias.data_ptr()),
            *(inputs.data_ptr(), given, x, token_scales, token_scales + 4 * tokens),
            *(tokens, rows, columns, out_features, in_features, tokens if x == inputs.data_ptr() else ready),
        )
        return out if width == out_features else out[:, :out_features].contiguous()

    return product


@cache
def _function(tiling: Tiling, dtype: torch.dtype, device: int, form: RoundedForm) -> CudaFunction:
    code = compile_many_tokens(tiling, dtype, form)
    with torch.cuda.device(device):
        return CudaFunction(code, "many_tokens", _Parameters, tiling.threads, tiling.shared_bytes, early=True)


@lru_cache(maxsize=_MAPS)
def _map(
    address: int, rows: int, columns: int, box_rows: int, box_columns: int = 64, entry_bytes: int = 2
) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows, box_columns, entry_bytes)
