"""Round tokens to 8 bits on a GPU in one pass over memory, and scale a library's sums; see ``kernel.cu``.

The plain-torch version is :func:`prox24_lightning.convert.kernels.round_tokens.reference.round_tokens`.
Run on compute capability 9.0; on 8.0 to 8.9 the program has only been compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, c_float, c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.cuda_driver import CudaFunction
from prox24_lightning.convert.kernels.nvrtc import compile_program
from prox24_lightning.weights.rounding import VALUE_DTYPES, RoundedForm

SOURCE = Path(__file__).with_name("kernel.cu")
SHARED_SOURCE = Path(__file__).with_name("rounding.cu")

OVERLAPPING = (9, 0)
"""From this compute capability a kernel can start while the one before it ends."""

_THREADS = 256
_FORMS: dict[RoundedForm, int] = {"fp8_e4m3": 1, "int8": 2}
_INPUTS_A_BLOCK = 8 * _THREADS
_HELD = (1, 2, 4, 8)

RoundTokens = Callable[[Tensor, int], Tensor]
"""(inputs, address of the fixed scale or of a 0) -> int8 (bytes,): the values row by row, then the tokens' scales.

Such a result in place of the inputs is returned as it is: what made the tokens has rounded them.
"""


@dataclass(frozen=True, eq=False)
class Rounding:
    """How a layer of 8 bits takes tokens that are rounded already, as a :data:`RoundTokens` returns them.

    Attributes:
        form: of the values.
        columns: values of a token; those behind its features are zeros.
        given: float32, whose first entry is the fixed scale of all tokens; 0 gives each token its own.
    """

    form: RoundedForm
    columns: int
    given: Tensor

    def empty(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for rounded tokens, and views of it: (tokens, columns) values, float32 (tokens,) scales."""
        size = tokens * self.columns
        whole = torch.empty(size + 4 * tokens, dtype=torch.int8, device=self.given.device)
        return whole, values_view(whole, self.form, tokens, self.columns), whole[size:].view(torch.float32)


class _RoundParameters(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "given", "values", "scales", "counters")),
        *((name, c_int) for name in ("inputs", "columns", "cleared")),
    )


class _ScaleParameters(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("sums", "token_scales", "row_scales", "bias", "y")),
        *((name, c_int) for name in ("outputs", "stride")),
        ("unit", c_float),
    )


def form_macro(form: RoundedForm | None) -> int:
    """Return the kernels' macro FORM; None is a weight of 16 bits."""
    return 0 if form is None else _FORMS[form]


@cache
def compile_round_tokens(form: RoundedForm, dtype: torch.dtype, capability: tuple[int, int], held: int = 1) -> bytes:
    """Return the machine code for inputs of ``dtype``, kept for the process; ``held`` is the macro HELD."""
    macros = {"BF16": int(dtype == torch.bfloat16), "FORM": form_macro(form), "HELD": held}
    return compile_program(f"{SHARED_SOURCE.read_text()}\n{SOURCE.read_text()}", macros, capability)


def prepare(
    form: RoundedForm,
    dtype: torch.dtype,
    in_features: int,
    columns: int,
    tokens: int,
    device: int,
    *,
    first: int | None = None,
    counters: int = 0,
) -> RoundTokens:
    """Return the rounding of ``tokens`` tokens; the rows of the result have ``columns`` values, padded with zeros.

    Args:
        form: of the values.
        dtype: float16 or bfloat16, of the inputs.
        in_features: of a token.
        columns: a multiple of 16, at least ``in_features``.
        tokens: rows of the inputs.
        device: index of the GPU.
        first: how many of them are rounded, with room for all, at least one; None for all.
        counters: zeros of 32 bits behind the scales, for the product.

    Raises:
        CudaError: if the kernel cannot be compiled or loaded here.
    """
    held = next((held for held in _HELD if held * _INPUTS_A_BLOCK >= columns), _HELD[-1])
    launch = _round_function(form, dtype, device, held)
    gpu, raw_stream = torch.device("cuda", device), torch._C._cuda_getCurrentRawStream
    size = tokens * columns
    grid = tokens if first is None else first, 1, 1

    def round_tokens(inputs: Tensor, given: int) -> Tensor:
        if inputs.dtype == torch.int8:
            return inputs
        rounded = torch.empty(size + 4 * (tokens + counters), dtype=torch.int8, device=gpu)
        values = rounded.data_ptr()
        scales = values + size
        addresses = inputs.data_ptr(), given, values, scales, scales + 4 * tokens
        launch(grid, raw_stream(device), *addresses, in_features, columns, counters)
        return rounded

    return round_tokens


def prepare_scaling(
    form: RoundedForm,
    dtype: torch.dtype,
    out_features: int,
    stride: int,
    tokens: int,
    device: int,
    unit: float = 1.0,
) -> Callable[[Tensor, int, int, Tensor | None], Tensor]:
    """Return ``(sums, address of the tokens' scales, of the rows' scales, bias or None) -> outputs``.

    Args:
        form: of the program.
        dtype: float16 or bfloat16, of sums, bias and outputs.
        out_features: of the outputs.
        stride: sums of a token in memory, a multiple of 8.
        tokens: rows of sums and outputs.
        device: index of the GPU.
        unit: what the sums are multiplied by as well.
    """
    launch = _scale_function(form, dtype, device)
    gpu, raw_stream = torch.device("cuda", device), torch._C._cuda_getCurrentRawStream
    grid = tokens, -(-out_features // _INPUTS_A_BLOCK), 1

    def scale_tokens(sums: Tensor, token_scales: int, row_scales: int, bias: Tensor | None) -> Tensor:
        out = torch.empty((tokens, out_features), dtype=dtype, device=gpu)
        addresses = 0 if bias is None else bias.data_ptr(), out.data_ptr()
        sizes = out_features, stride, unit
        launch(grid, raw_stream(device), sums.data_ptr(), token_scales, row_scales, *addresses, *sizes)
        return out

    return scale_tokens


def values_view(rounded: Tensor, form: RoundedForm, tokens: int, columns: int) -> Tensor:
    """Return the (tokens, columns) values of what a :data:`RoundTokens` returns."""
    return rounded[: tokens * columns].view(VALUE_DTYPES[form]).view(tokens, columns)


@cache
def _round_function(form: RoundedForm, dtype: torch.dtype, device: int, held: int) -> CudaFunction:
    capability = torch.cuda.get_device_capability(device)
    code = compile_round_tokens(form, dtype, capability, held)
    with torch.cuda.device(device):
        return CudaFunction(code, "round_tokens", _RoundParameters, _THREADS, early=capability >= OVERLAPPING)


@cache
def _scale_function(form: RoundedForm, dtype: torch.dtype, device: int) -> CudaFunction:
    code = compile_round_tokens(form, dtype, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return CudaFunction(code, "scale_tokens", _ScaleParameters, _THREADS)
