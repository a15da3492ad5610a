"""The ways to multiply with a packed 2:4 weight, by name, and the plain-text table that says which runs when.

A table is text (``"8=few:0,1,1,1,16,1,2,2 4096=cusparselt:17"``), because it is an argument of the operator that
``torch.compile`` writes into its programs, and these outlive the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.kernels.buffer_layout import padded_shape
from prox24_lightning.convert.kernels.cusparselt import library as cusparselt
from prox24_lightning.convert.kernels.few_tokens import kernel as few_tokens
from prox24_lightning.convert.kernels.few_tokens.kernel import Tiling
from prox24_lightning.convert.kernels.warpgroup import kernel as warpgroup
from prox24_lightning.convert.kernels.warpgroup.kernel import Blocking

Way = Literal["dense", "few", "warpgroup", "cusparselt", "torch", "expand"]

Run = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(tokens, padded in_features) rows, the buffer, the dense weight if it is kept, the bias -> (tokens, out_features)."""

_FEW_BESIDE_WARPGROUP = 16  # up to so many tokens it wins on one shape or another
_PLANS = 4096  # kept at most: one for each layer with a bias (or shape without) and padded number of tokens


@dataclass(frozen=True)
class Kernel:
    """One way to multiply.

    Attributes:
        way: "dense" (cuBLAS on the kept dense weight), "few" (the package's kernel for few tokens), "warpgroup" (its
            kernel for Hopper), "cusparselt" (with a plan of our own), "torch" (its operator, which makes a plan at
            every call), "expand" (the dense weight made anew at every call, then cuBLAS).
        numbers: of "few" the fields of a :class:`~prox24_lightning.convert.kernels.few_tokens.kernel.Tiling`, of "warpgroup"
            those of a :class:`~prox24_lightning.convert.kernels.warpgroup.kernel.Blocking`; of "cusparselt" the algorithm, or
            nothing for the library's default.
    """

    way: Way
    numbers: tuple[int, ...] = ()

    @classmethod
    def few(cls, tiling: Tiling) -> Kernel:
        return cls("few", astuple(tiling))

    @classmethod
    def warpgroup(cls, blocking: Blocking) -> Kernel:
        return cls("warpgroup", astuple(blocking))

    @classmethod
    def parse(cls, text: str) -> Kernel:
        way, _, numbers = text.partition(":")
        return cls(way, tuple(int(number) for number in numbers.split(",") if number))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.way}:{','.join(map(str, self.numbers))}" if self.numbers else self.way


def own_kernels(tokens: int, capability: tuple[int, int]) -> tuple[Kernel, ...]:
    """The package's kernels worth measuring at a number of tokens on a GPU of this compute capability."""
    found = tuple(map(Kernel.warpgroup, warpgroup.blockings(tokens, capability)))
    if found and tokens > _FEW_BESIDE_WARPGROUP:
        return found
    return (*map(Kernel.few, few_tokens.tilings(tokens, capability)), *found)


def compile_kernel(kernel: Kernel, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Have the program of one of the package's kernels ready; threads may compile several at once."""
    if kernel.way == "few":
        few_tokens.program(Tiling(*kernel.numbers), dtype, capability)
    elif kernel.way == "warpgroup":
        warpgroup.program(Blocking(*kernel.numbers), dtype)


@cache
def parse_table(table: str) -> tuple[tuple[int, ...], tuple[Kernel, ...]]:
    """Token counts in ascending order, and the kernel up to each; the last one serves larger counts too."""
    entries = [entry.split("=") for entry in table.split()]
    return tuple(int(tokens) for tokens, _ in entries), tuple(Kernel.parse(kernel) for _, kernel in entries)


def kernel_for(table: str, tokens: int) -> Kernel:
    """The kernel that a table names for a number of tokens."""
    counts, kernels = parse_table(table)
    return kernels[min(bisect_left(counts, tokens), len(kernels) - 1)]


def prepare(kernel: Kernel, dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int) -> Run:
    """All that can be done before the call: what it returns only allocates and launches.

    Raises:
        CusparseltError, NvrtcError: if the library or the compiler cannot be used here.
    """
    out_features = shape[0]
    rows, columns = padded_shape(shape)
    on = torch.device("cuda", device)
    raw_stream = torch._C._cuda_getCurrentRawStream

    def dense(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            raise RuntimeError("this layer keeps no dense weight: convert it with keep_dense=True")
        return F.linear(inputs, weight.view(dtype), _cast(bias, dtype))

    def by_torch(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        packed = buffer.view(dtype)
        result = torch._cslt_sparse_mm(packed, _padded(inputs, tokens).t(), transpose_result=True)
        result = result[:tokens, :out_features].contiguous()
        return result if bias is None else result.add_(bias.to(dtype))

    if kernel.way == "expand":
        expansion = few_tokens.expansion(device)
        blocks = few_tokens.expansion_grid(rows, columns)

        def expand(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            full = torch.empty((rows, columns), dtype=dtype, device=on)
            expansion(blocks, raw_stream(device), buffer.data_ptr(), full.data_ptr(), rows, columns)
            if columns != shape[1]:
                inputs, full = inputs[:, : shape[1]], full[:, : shape[1]]
            return F.linear(inputs, full[:out_features], _cast(bias, dtype))

        return expand
    if kernel.way == "few":
        tiling = Tiling(*kernel.numbers)
        launch = few_tokens.product(tiling, dtype, device)
        grid = -(-rows // tiling.rows), tiling.cluster, -(-tokens // tiling.tokens)

        def few(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            out = torch.empty((tokens, out_features), dtype=dtype, device=on)
            at = 0
            if bias is not None:
                bias = bias if bias.dtype == dtype else bias.to(dtype)
                at = bias.data_ptr()
            launch(
                *(grid, raw_stream(device), inputs.data_ptr(), buffer.data_ptr(), at, out.data_ptr()),
                *(tokens, rows, columns, out_features),
            )
            return out

        return few
    if kernel.way == "warpgroup":
        start = warpgroup.prepare(Blocking(*kernel.numbers), dtype, shape, tokens, device)

        def by_warpgroups(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            out = torch.empty((tokens, out_features), dtype=dtype, device=on)
            bias = _cast(bias, dtype)
            at = 0 if bias is None else bias.data_ptr()
            start(inputs.data_ptr(), buffer.data_ptr(), at, out.data_ptr(), raw_stream(device))
            return out

        return by_warpgroups
    if kernel.way == "cusparselt":
        padded = -(-tokens // cusparselt.TOKEN_MULTIPLE) * cusparselt.TOKEN_MULTIPLE
        algorithm = kernel.numbers[0] if kernel.numbers else None
        plain = _plan(dtype, (rows, columns), padded, 0, algorithm, device)

        def planned(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            out = torch.empty((padded, rows), dtype=dtype, device=on)
            plan = plain
            inside = bias is not None and bias.dtype == dtype and rows == out_features
            if bias is not None and inside:
                plan = _plan(dtype, (rows, columns), padded, bias.data_ptr(), algorithm, device)
            space = 0
            if plan.workspace_bytes:
                workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=on)
                space = workspace.data_ptr()
            inputs = _padded(inputs, tokens)
            plan.run(buffer.data_ptr(), inputs.data_ptr(), out.data_ptr(), space, raw_stream(device))
            if rows != out_features:
                out = out[:, :out_features].contiguous()
            out = out if padded == tokens else out[:tokens]
            return out if bias is None or inside else out.add_(bias.to(dtype))

        return planned
    return {"dense": dense, "torch": by_torch}[kernel.way]


@lru_cache(maxsize=_PLANS)
def _plan(
    dtype: torch.dtype, shape: tuple[int, int], tokens: int, bias: int, algorithm: int | None, device: int
) -> cusparselt.Plan:
    library = cusparselt.load()
    try:
        return cusparselt.Plan(library, device, dtype, shape, tokens, bias, algorithm)
    except cusparselt.CusparseltError:
        if algorithm is None:
            raise
        # An algorithm was measured at one number of tokens, and need not take every other one.
        return cusparselt.Plan(library, device, dtype, shape, tokens, bias)


def _padded(inputs: Tensor, tokens: int) -> Tensor:
    missing = -tokens % cusparselt.TOKEN_MULTIPLE
    return F.pad(inputs, (0, 0, 0, missing)) if missing else inputs


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
