"""Multiply one to some hundreds of tokens with a packed weight on Hopper; see ``kernel.cu``.

These products are bound by reading the weight. The kernel loads the packed weight with the copy engine (TMA) and
multiplies it as it is on the sparse tensor cores of a warpgroup (``wgmma``).
Which :class:`.tiling.Tiling` is fastest depends on the shape and is measured
(:mod:`~prox24_lightning.convert.autotune.tune`). The plain-torch version is
:func:`prox24_lightning.convert.kernels.reference.linear`.
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
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.packed_buffer import padded_shape
from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.warpgroup.tensor_map import TensorMap, encode_tensor_map
from prox24_lightning.convert.kernels.warpgroup.tiling import CAPABILITY, Tiling

SOURCE = Path(__file__).with_name("kernel.cu")

_INPUT_MAPS = 64  # kept at most: an allocator hands out the same addresses again and again
_WEIGHT_MAPS = 4096


class _Parameters(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("values", "inputs")),
        *((name, c_void_p) for name in ("metadata", "bias", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs")),
    )


@cache
def compile_warpgroup(tiling: Tiling, dtype: torch.dtype) -> bytes:
    """Return the machine code of a tiling, kept for the process; several threads may compile at once."""
    text = SOURCE.read_text().replace("// MULTIPLY\n", wgmma_instruction(tiling.tokens, dtype))
    macros = {**tiling.macros, "BF16": int(dtype == torch.bfloat16)}
    return compile_program(text, macros, CAPABILITY, all_features=True)


def prepare(config: Sequence[int], dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int) -> Product:
    """Return the product for one shape and number of tokens.

    Args:
        config: the fields of a :class:`~prox24_lightning.convert.kernels.warpgroup.tiling.Tiling`.
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
    blocks = -(-rows // (tiling.rows * tiling.across)) * tiling.across
    grid = blocks, tiling.cluster, -(-tokens // tiling.tokens)
    share = tiling.tokens // tiling.across
    values_bytes = rows * columns

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        out = torch.empty((tokens, out_features), dtype=dtype, device=gpu)
        bias = cast_bias(bias, dtype)
        address = buffer.data_ptr()
        values = _weight_map(address, rows, columns // 2, tiling.rows)
        launch(
            *(grid, raw_stream(device), values, _input_map(inputs.data_ptr(), tokens, columns, share)),
            *(address + values_bytes, 0 if bias is None else bias.data_ptr(), out.data_ptr()),
            *(tokens, rows, columns, out_features),
        )
        return out

    return product


def wgmma_instruction(tokens: int, dtype: torch.dtype) -> str:
    """Return CUDA C++ for ``multiply``: 64 rows, 32 inputs and ``tokens`` tokens, with all its registers by name."""
    count = tokens // 2
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
template <int SELECTOR>
__device__ __forceinline__ void multiply(float (&d)[{count}], u64 a, u64 b, u32 metadata) {{
  asm volatile("{{ .reg .pred p; setp.eq.u32 p, 0, 0; "
               "wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind} {{{sums}}}, "
               "%{count}, %{count + 1}, %{count + 2}, %{count + 3}, p, 1, 1, 0, 0; }}"
               : {outputs} : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR));
}}
"""


@cache
def _function(tiling: Tiling, dtype: torch.dtype, device: int) -> CudaFunction:
    code = compile_warpgroup(tiling, dtype)
    with torch.cuda.device(device):
        return CudaFunction(code, "warpgroup", _Parameters, tiling.threads, tiling.shared_bytes, early=True)


@lru_cache(maxsize=_WEIGHT_MAPS)
def _weight_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows)


@lru_cache(maxsize=_INPUT_MAPS)
def _input_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows)
