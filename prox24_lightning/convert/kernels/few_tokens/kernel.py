"""The package's own kernels on packed weights: products with few tokens, and the expansion to the dense weight.

A product with few tokens waits for the weight to be read. The kernel reads 0.5625 of what a dense one reads, and has
the sparse tensor cores multiply it as it is; see ``few_tokens.cu``. What a :class:`Tiling` is best depends on the shape
and is measured (:mod:`~prox24_lightning.convert.autotune.search`).
"""

from __future__ import annotations

from ctypes import Structure, c_int, c_void_p
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.buffer_layout import padded_shape
from prox24_lightning.convert.kernels.nvrtc import Function, compile_program

SOURCE = Path(__file__).with_name("few_tokens.cu")
EXPAND_SOURCE = Path(__file__).with_name("expand.cu")

OLDEST_CAPABILITY = (8, 0)
"""Sparse tensor cores; clusters of blocks (``cluster`` above 1) need 9.0."""

MOST_TOKENS = 256
"""Above this, cuSPARSELt is faster: its kernels are made for products bound by arithmetic."""

_CLUSTERS = (9, 0)
_AT_ONCE = 64


@dataclass(frozen=True)
class Tiling:
    """How the work is cut up; the names in ``few_tokens.cu`` in brackets.

    Attributes:
        staged: the tokens' inputs pass through shared memory (STAGED).
        row_tiles: 16-row tiles a warp (MT).
        token_tiles: 8-token tiles (NT): 8 times as many tokens at most.
        row_warps: warps of a block along the rows (WR).
        sum_warps: warps of a block along the sum (WK).
        cluster: blocks along the sum (CS).
        span: pieces of 64 inputs that a warp takes at a time (SPAN); two fill whole lines of memory.
        depth: pieces a warp has under way (DEPTH), a multiple of ``span``.
        resident: blocks that a multiprocessor is to hold (RESIDENT).
    """

    staged: int
    row_tiles: int
    token_tiles: int
    row_warps: int
    sum_warps: int
    cluster: int
    span: int
    depth: int
    resident: int

    @property
    def tokens(self) -> int:
        """The most tokens it can take."""
        return 8 * self.token_tiles

    @property
    def rows(self) -> int:
        """Rows of the weight a block."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.sum_warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block: two buffers of inputs, and in the end the partial sums."""
        buffers = 2 * self.tokens * self.sum_warps * self.span * 128 if self.staged else 0
        return max(buffers, self.sum_warps * self.rows * (self.tokens + 1) * 4)

    def __str__(self) -> str:
        return ",".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def macros(self) -> dict[str, int]:
        names = ("STAGED", "MT", "NT", "WR", "WK", "CS", "SPAN", "DEPTH", "RESIDENT")
        return dict(zip(names, (getattr(self, field.name) for field in fields(self)), strict=True))


TILINGS = tuple(
    Tiling(*numbers)
    for numbers in (
        *((0, 1, 1, 1, 16, 1, 2, 2, 2), (0, 1, 1, 1, 8, 1, 2, 2, 4), (0, 1, 1, 1, 4, 1, 2, 2, 8)),
        *((0, 1, 1, 1, 8, 2, 2, 2, 3), (0, 1, 1, 1, 8, 1, 2, 4, 1), (0, 2, 1, 1, 8, 1, 2, 2, 2)),
        *((0, 1, 2, 1, 8, 1, 2, 2, 2), (0, 2, 2, 1, 8, 1, 2, 2, 2), (0, 2, 2, 1, 8, 2, 2, 2, 2)),
        *((0, 2, 2, 2, 4, 1, 2, 2, 2), (0, 2, 2, 1, 4, 1, 2, 2, 4), (0, 4, 2, 1, 8, 2, 2, 2, 1)),
        *((0, 2, 4, 1, 8, 1, 2, 2, 1), (0, 2, 4, 1, 8, 2, 2, 2, 1), (1, 2, 4, 4, 2, 1, 2, 2, 2)),
        *((1, 2, 4, 4, 2, 2, 2, 2, 2), (1, 2, 4, 2, 4, 2, 2, 2, 2), (1, 2, 4, 2, 4, 4, 2, 2, 2)),
        *((1, 2, 8, 4, 2, 1, 2, 2, 1), (1, 2, 8, 4, 2, 2, 2, 2, 1), (1, 2, 8, 4, 2, 4, 2, 2, 1)),
        *((1, 2, 8, 4, 2, 1, 2, 4, 1), (1, 2, 8, 8, 1, 2, 2, 2, 1), (1, 2, 8, 8, 1, 4, 2, 2, 1)),
        *((1, 2, 8, 4, 1, 2, 2, 2, 2), (1, 1, 8, 4, 2, 2, 2, 2, 2), (1, 1, 8, 4, 4, 2, 2, 2, 1)),
        *((1, 2, 16, 8, 1, 2, 1, 1, 1), (1, 1, 16, 8, 1, 2, 2, 2, 1), (1, 1, 16, 4, 2, 2, 2, 2, 1)),
    )
)
"""Those worth measuring: for each number of tokens the fastest of about a hundred on one shape or another (H200)."""


class _Product(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "bias", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs")),
    )


class _Expansion(Structure):
    _fields_ = (("packed", c_void_p), ("dense", c_void_p), ("rows", c_int), ("columns", c_int))


def tilings(tokens: int, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Tilings to try for ``tokens`` tokens on a GPU; none above :data:`MOST_TOKENS` or before 8.0.

    The smallest that take them all at once; above 64 tokens also those that take 64 at a time.
    """
    if capability < OLDEST_CAPABILITY or tokens > MOST_TOKENS:
        return ()
    able = [tiling for tiling in TILINGS if tiling.cluster == 1 or capability >= _CLUSTERS]
    least = min(tiling.tokens for tiling in able if tiling.tokens >= min(tokens, _AT_ONCE))
    return tuple(tiling for tiling in able if tiling.tokens == least or tokens > least <= tiling.tokens)


@cache
def program(tiling: Tiling, dtype: torch.dtype, capability: tuple[int, int]) -> bytes:
    """Machine code, kept for the process; threads may compile several at once."""
    return compile_program(SOURCE.read_text(), {**tiling.macros, "BF16": int(dtype == torch.bfloat16)}, capability)


@cache
def product(tiling: Tiling, dtype: torch.dtype, device: int) -> Function:
    """The kernel ``y = x W^T + bias``: call it with a grid, a stream and :class:`_Product`'s fields."""
    code = program(tiling, dtype, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return Function(code, "few_tokens", _Product, tiling.threads, tiling.shared_bytes)


def expand(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense (out_features, in_features) weight of a buffer on a GPU, exactly."""
    rows, columns = padded_shape(shape)
    dense = torch.empty(rows, columns, dtype=dtype, device=buffer.device)
    device = buffer.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        grid = expansion_grid(rows, columns)
        expansion(device)(grid, stream, buffer.data_ptr(), dense.data_ptr(), rows, columns)
    return dense[: shape[0], : shape[1]]


def expansion_grid(rows: int, columns: int) -> tuple[int, int, int]:
    """Blocks of :func:`expansion` for a weight of this padded shape."""
    return rows, -(-columns // 1024), 1


@cache
def expansion(device: int) -> Function:
    """The kernel of :func:`expand`: call it with a grid, a stream and :class:`_Expansion`'s fields."""
    code = compile_program(EXPAND_SOURCE.read_text(), {}, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return Function(code, "expand", _Expansion, 256)
