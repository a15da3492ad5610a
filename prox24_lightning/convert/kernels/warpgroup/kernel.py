"""Multiply one to some hundreds of tokens with a packed weight on Hopper; see ``kernel.cu``.

These products are bound by reading the weight. The kernel loads the packed weight with the copy engine (TMA) and
multiplies it as it is on the sparse tensor cores of a warpgroup (``wgmma``). The inputs of a weight of 8 bits are
rounded by a kernel before it, and it reads its first pieces of the weight meanwhile.
Which :class:`.tiling.Tiling` is fastest depends on the shape and is measured
(:mod:`~prox24_lightning.convert.autotune.tune`). The plain-torch version is
:func:`prox24_lightning.convert.kernels.reference.linear`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int, c_void_p
from dataclasses import astuple
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.round_tokens.kernel import form_macro
from prox24_lightning.convert.kernels.warpgroup.tensor_map import TensorMap, encode_tensor_map
from prox24_lightning.convert.kernels.warpgroup.tiling import CAPABILITY, Tiling
from prox24_lightning.weights.rounding import RoundedForm

SOURCE = Path(__file__).with_name("kernel.cu")
SHARED_SOURCE = Path(__file__).with_name("hopper.cu")

_INPUT_MAPS = 64  # kept at most: an allocator hands out the same addresses again and again
_WEIGHT_MAPS = 4096

_TILE_ENTRIES = 32  # of eight bytes that a tile of metadata has in 16 bits


class _Parameters(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("values", "inputs", "metadata")),
        *((name, c_void_p) for name in ("row_scales", "token_scales", "bias", "y", "x", "given")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs", "width")),
    )


@cache
def compile_warpgroup(tiling: Tiling, dtype: torch.dtype, form: RoundedForm | None = None) -> bytes:
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
        config: the fields of a :class:`~prox24_lightning.convert.kernels.warpgroup.tiling.Tiling`.
        dtype: float16 or bfloat16, of inputs and outputs.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: of a weight of 8 bits; None for one in ``dtype``.

    Raises:
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    tiling = Tiling(*config).for_token(shape, tokens)
    out_features, in_features = shape
    tile = _TILE_ENTRIES if form is None else 2 * _TILE_ENTRIES
    of_rounded = prepare(astuple(tiling.without()), dtype, shape, tokens, device, form) if tiling.within else None
    if form is None:
        rows, words = packed_buffer.padded_shape(shape)
    else:
        rows, columns = rounded_buffer.padded_shape(shape)
        words = columns // 2
        places = rounded_buffer.places(shape)
        round_inputs = round_tokens.prepare(form, dtype, in_features, columns, tokens, device)
    gpu = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream
    launch = _function(tiling, dtype, device, form, tiling.token_bytes(words) if tiling.within else 0)
    blocks = -(-rows // (tiling.rows * tiling.across)) * tiling.across
    grid = blocks, tiling.cluster, -(-tokens // tiling.tokens)
    share = tiling.tokens // tiling.across

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if of_rounded is not None and inputs.dtype == torch.int8:
            return of_rounded(inputs, buffer, weight, bias)
        out = torch.empty(
            (*inputs.shape[:-1], out_features) if form is None else (tokens, out_features), dtype=dtype, device=gpu
        )
        bias = cast_bias(bias, dtype)
        address = buffer.data_ptr()
        x = token = inputs.data_ptr()
        row_scales = scales = given = 0
        if form is not None:
            row_scales, given = address + places.row_scales, address + places.input_scale
            if not tiling.within:
                rounded = round_inputs(inputs, given)
                x = rounded.data_ptr()
                scales = x + tokens * columns
        values = _weight_map(address, rows, words // 2, tiling.rows)
        metadata = _metadata_map(address + rows * words, rows // 64, words // 32 * tile, tiling.groups, 4 * tile)
        launch(
            *(
                grid,
                raw_stream(device),
                values,
                values if tiling.within else _input_map(x, tokens, words, share),
                metadata,
            ),
            *(row_scales, scales, 0 if bias is None else bias.data_ptr(), out.data_ptr(), token, given),
            *(tokens, rows, words, out_features, in_features),
        )
        return out

    return product


def program_text(source: Path, tokens: int, dtype: torch.dtype, form: RoundedForm | None) -> str:
    """Return a kernel on ``wgmma.sp`` behind what these share, and with its instruction."""
    kernel = source.read_text().replace("// MULTIPLY\n", wgmma_instruction(tokens, dtype, form))
    return f"{round_tokens.SHARED_SOURCE.read_text()}\n{SHARED_SOURCE.read_text()}\n{kernel}"


def wgmma_instruction(tokens: int, dtype: torch.dtype, form: RoundedForm | None = None) -> str:
    """Return CUDA C++ for ``multiply``: 64 rows, 32 words and ``tokens`` tokens, with all its registers by name."""
    count = tokens // 2
    constraint, signs = "+f", "1, 1"
    if form == "int8":
        kind, constraint, signs = "k64.s32.s8.s8", "+r", ""
    elif form == "fp8_e4m3":
        kind = "k64.f32.e4m3.e4m3"
    else:
        kind = "k32.f32.bf16.bf16" if dtype == torch.bfloat16 else "k32.f32.f16.f16"
        signs = "1, 1, 0, 0"  # and neither operand transposed
    immediates = f", {signs}" if signs else ""
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    return f"""
template <int SELECTOR>
__device__ __forceinline__ void multiply(Sum (&d)[{count}], u64 a, u64 b, u32 metadata) {{
  asm volatile("{{ .reg .pred p; setp.eq.u32 p, 0, 0; "
               "wgmma.mma_async.sp.sync.aligned.m64n{tokens}{kind} {{{sums}}}, "
               "%{count}, %{count + 1}, %{count + 2}, %{count + 3}, p{immediates}; }}"
               : {outputs} : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR));
}}
"""


@cache
def _function(
    tiling: Tiling, dtype: torch.dtype, device: int, form: RoundedForm | None, token_bytes: int
) -> CudaFunction:
    code = compile_warpgroup(tiling, dtype, form)
    shared = tiling.shared_bytes(rounded=form is not None) + token_bytes
    with torch.cuda.device(device):
        return CudaFunction(code, "warpgroup", _Parameters, tiling.threads, shared, early=True)


@lru_cache(maxsize=_WEIGHT_MAPS)
def _weight_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows)


@lru_cache(maxsize=_WEIGHT_MAPS)
def _metadata_map(
    address: int, rows: int, columns: int, box_rows: int, box_columns: int
) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows, box_columns, 8)


@lru_cache(maxsize=_INPUT_MAPS)
def _input_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return encode_tensor_map(address, rows, columns, box_rows)
