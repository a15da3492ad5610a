"""The package's kernel for one to some hundreds of tokens on Hopper: products bound by the reading of the weight.

There cuBLAS waits for the weight too, and cuSPARSELt has no good kernel. This one reads the packed weight with the copy
engine and multiplies it as it is on the sparse tensor cores of a warpgroup (``wgmma``); see ``warpgroup.cu``.
Which :class:`Blocking` is best depends on the shape and is measured
(:mod:`~prox24_lightning.convert.autotune.search`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_int, c_void_p
from dataclasses import astuple, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from prox24_lightning.convert.kernels.buffer_layout import padded_shape
from prox24_lightning.convert.kernels.nvrtc import Function, compile_program
from prox24_lightning.convert.kernels.warpgroup.tensor_map import TensorMap, tensor_map

SOURCE = Path(__file__).with_name("warpgroup.cu")

CAPABILITY = (9, 0)
"""The only one: later GPUs have other instructions."""

MOST_TOKENS = 512
"""Above, cuSPARSELt is faster."""

_AT_ONCE = 128  # up to so many tokens they are best taken all at once
_SHARED = 227 * 1024  # bytes a block can have
_MULTIPROCESSORS = 132
_MOST_STAGES = 12
_START, _MEETING = 2**16, 2**15  # bytes that could be brought while a block starts, and adds another one's sums
_INPUTS_KEPT = 64  # maps of inputs: an allocator hands out the same addresses again and again
_WEIGHTS_KEPT = 4096


@dataclass(frozen=True)
class Blocking:
    """How the work is cut up; the names in ``warpgroup.cu`` in brackets.

    Attributes:
        tokens: of a block (TOKENS).
        groups: warpgroups of a block, 64 rows of the weight each (GROUPS).
        across: neighbouring blocks along the rows that share their inputs (CR).
        cluster: blocks along the sum (CS).
        stages: pieces of 128 inputs in shared memory (STAGES).
    """

    tokens: int
    groups: int
    across: int
    cluster: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of the weight a block."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * self.groups + 32

    @property
    def stage_bytes(self) -> int:
        return 128 * self.rows + 256 * self.tokens + 16 * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block: the stages, in the end the partial sums; behind them two barriers a stage."""
        return max(self.stages * self.stage_bytes, self.tokens * (self.rows + 4) * 4) + 16 * self.stages

    def cost(self, shape: tuple[int, int], tokens: int) -> int:
        """What a multiprocessor has to do, in bytes brought to it; a guide where nothing has been measured."""
        rows, columns = padded_shape(shape)
        blocks = -(-rows // (self.rows * self.across)) * self.across * self.cluster * -(-tokens // self.tokens)
        block = -(-columns // (128 * self.cluster)) * self.stage_bytes + _START + _MEETING * (self.cluster - 1)
        return -(-blocks // _MULTIPROCESSORS) * block

    @property
    def macros(self) -> dict[str, int]:
        return dict(zip(("TOKENS", "GROUPS", "CR", "CS", "STAGES"), astuple(self), strict=True))


def _blocking(tokens: int, groups: int, across: int, cluster: int, resident: int = 1) -> Blocking:
    """As many stages as fit when a multiprocessor is to hold ``resident`` blocks."""
    stage = Blocking(tokens, groups, across, cluster, 1).stage_bytes
    return Blocking(tokens, groups, across, cluster, min(_MOST_STAGES, (_SHARED // resident - 1024) // (stage + 16)))


BLOCKINGS = tuple(
    _blocking(tokens, *numbers)
    for tokens, cuts in (
        (8, ((1, 1, 2), (2, 1, 1, 2), (2, 1, 4, 2), (1, 1, 1), (1, 1, 4), (1, 1, 8))),
        (16, ((1, 1, 2), (2, 2, 1, 2), (2, 1, 4, 2), (1, 1, 4), (1, 1, 8))),
        (32, ((1, 1, 2), (1, 4, 1, 2), (2, 1, 1), (2, 1, 3), (1, 1, 4), (1, 1, 8))),
        (64, ((1, 1, 2), (2, 1, 1), (2, 4, 1), (2, 2, 3), (3, 1, 2), (1, 1, 4), (1, 1, 8))),
        (128, ((1, 1, 2), (2, 2, 1), (2, 1, 2), (2, 1, 3), (3, 1, 2), (3, 1, 1), (4, 1, 1), (1, 1, 4), (1, 1, 8))),
        (256, ((1, 1, 2), (2, 1, 1), (2, 1, 2))),
    )
    for numbers in cuts
)
"""Those worth measuring: for each number of tokens the fastest of some fifty on one shape or another (H200)."""


class _Product(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("values", "inputs")),
        *((name, c_void_p) for name in ("positions", "bias", "y")),
        *((name, c_int) for name in ("tokens", "rows", "columns", "outputs")),
    )


def blockings(tokens: int, capability: tuple[int, int]) -> tuple[Blocking, ...]:
    """Those to try for ``tokens`` tokens on a GPU; none above :data:`MOST_TOKENS` or for another one than Hopper.

    The smallest that take them all at once; above 128 tokens also those that take 128 at a time, and up to 8 also those
    for 16 whose neighbours share their inputs, which they do eight tokens each.
    """
    if capability != CAPABILITY or tokens > MOST_TOKENS:
        return ()
    sizes = {blocking.tokens for blocking in BLOCKINGS}
    least = min((size for size in sizes if size >= tokens), default=max(sizes))
    shared = 2 * least if least == min(sizes) else 0
    return tuple(
        blocking
        for blocking in BLOCKINGS
        if blocking.tokens in (least, min(least, _AT_ONCE)) or (blocking.tokens == shared and blocking.across > 1)
    )


def _instruction(tokens: int, dtype: torch.dtype) -> str:
    """``multiply``: one product of 64 rows, 32 inputs and ``tokens`` tokens, whose registers all have to be named."""
    count = tokens // 2
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
template <int SELECTOR>
__device__ __forceinline__ void multiply(float (&d)[{count}], u64 a, u64 b, u32 positions) {{
  asm volatile("{{ .reg .pred p; setp.eq.u32 p, 0, 0; "
               "wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind} {{{sums}}}, "
               "%{count}, %{count + 1}, %{count + 2}, %{count + 3}, p, 1, 1, 0, 0; }}"
               : {outputs} : "l"(a), "l"(b), "r"(positions), "n"(SELECTOR));
}}
"""


@cache
def program(blocking: Blocking, dtype: torch.dtype) -> bytes:
    """Machine code, kept for the process; threads may compile several at once."""
    text = SOURCE.read_text().replace("// MULTIPLY\n", _instruction(blocking.tokens, dtype))
    macros = {**blocking.macros, "BF16": int(dtype == torch.bfloat16)}
    return compile_program(text, macros, CAPABILITY, all_features=True)


@cache
def _function(blocking: Blocking, dtype: torch.dtype, device: int) -> Function:
    code = program(blocking, dtype)
    with torch.cuda.device(device):
        return Function(code, "warpgroup", _Product, blocking.threads, blocking.shared_bytes, early=True)


@lru_cache(maxsize=_WEIGHTS_KEPT)
def _values_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return tensor_map(address, rows, columns, box_rows)


@lru_cache(maxsize=_INPUTS_KEPT)
def _inputs_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    return tensor_map(address, rows, columns, box_rows)


def prepare(
    blocking: Blocking, dtype: torch.dtype, shape: tuple[int, int], tokens: int, device: int
) -> Callable[[int, int, int, int, int], None]:
    """The product ``y = x W^T + bias`` for one shape and number of tokens.

    Returns:
        A function of the addresses of x, the packed weight, bias (or 0) and y, and of a stream, that launches it.
    """
    rows, columns = padded_shape(shape)
    launch = _function(blocking, dtype, device)
    blocks = -(-rows // (blocking.rows * blocking.across)) * blocking.across
    grid = blocks, blocking.cluster, -(-tokens // blocking.tokens)
    share = blocking.tokens // blocking.across
    sizes = tokens, rows, columns, shape[0]

    def run(inputs: int, packed: int, bias: int, out: int, stream: int) -> None:
        values = _values_map(packed, rows, columns // 2, blocking.rows)
        launch(
            *(grid, stream, values, _inputs_map(inputs, tokens, columns, share)),
            *(packed + rows * columns, bias, out, *sizes),
        )

    return run
