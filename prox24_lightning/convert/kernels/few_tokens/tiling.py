"""How the few-tokens kernel cuts up its work, and which tilings are worth measuring."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from prox24_lightning.weights.rounding import RoundedForm

OLDEST_CAPABILITY = (8, 0)
"""Sparse tensor cores; clusters of blocks (``cluster`` above 1) need 9.0."""

OLDEST_FP8_CAPABILITY, WITHOUT_FP8 = (8, 9), (9, 0)
"""float8 has come with 8.9; on Hopper only ``wgmma`` multiplies it, and ``mma`` is made of conversions to float16."""

MOST_TOKENS = 256
"""Above this, cuSPARSELt is faster: its kernels are made for products bound by arithmetic."""

_CLUSTERS = (9, 0)
_AT_ONCE = 64


@dataclass(frozen=True)
class Tiling:
    """How the work is cut up; the macros of ``kernel.cu`` in brackets.

    Attributes:
        staged: 1 if the tokens' inputs pass through shared memory (STAGED).
        row_tiles: 16-row tiles of a warp (MT).
        token_tiles: 8-token tiles (NT): 8 times as many tokens at most.
        row_warps: warps of a block along the rows (WR).
        sum_warps: warps of a block along the sum (WK).
        cluster: blocks along the sum (CS).
        span: neighbouring pieces of 64 inputs that a warp takes at a time (SPAN); two fill whole lines of memory.
        depth: pieces that a warp has in flight (DEPTH), a multiple of ``span``.
        resident: blocks that a multiprocessor holds (RESIDENT).
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
        """The most tokens that a block takes."""
        return 8 * self.token_tiles

    @property
    def rows(self) -> int:
        """Rows of the weight that a block takes."""
        return 16 * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.sum_warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two buffers of inputs, and in the end the partial sums."""
        buffers = 2 * self.tokens * self.sum_warps * self.span * 128 if self.staged else 0
        return max(buffers, self.sum_warps * self.rows * (self.tokens + 1) * 4)

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    @property
    def macros(self) -> dict[str, int]:
        """Macro -> value, for the compiler."""
        names = ("STAGED", "MT", "NT", "WR", "WK", "CS", "SPAN", "DEPTH", "RESIDENT")
        return dict(zip(names, astuple(self), strict=True))


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
"""The tilings worth measuring: of about a hundred, the fastest for each number of tokens on some shape (H200)."""


def tilings(tokens: int, capability: tuple[int, int], form: RoundedForm | None = None) -> tuple[Tiling, ...]:
    """Return the tilings to measure for ``tokens`` tokens on a GPU; none above :data:`MOST_TOKENS` or before 8.0.

    A weight of float8 has none before 8.9 and on Hopper. They are the smallest that take all tokens at once; above 64
    tokens also those that take 64 at a time.
    """
    if capability < OLDEST_CAPABILITY or tokens > MOST_TOKENS:
        return ()
    if form == "fp8_e4m3" and (capability < OLDEST_FP8_CAPABILITY or capability == WITHOUT_FP8):
        return ()
    able = [tiling for tiling in TILINGS if tiling.cluster == 1 or capability >= _CLUSTERS]
    least = min(tiling.tokens for tiling in able if tiling.tokens >= min(tokens, _AT_ONCE))
    return tuple(tiling for tiling in able if tiling.tokens == least or tokens > least <= tiling.tokens)
