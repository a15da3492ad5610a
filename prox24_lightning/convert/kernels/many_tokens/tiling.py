"""How the kernel for many tokens cuts up its work, and which tilings are worth measuring."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from prox24_lightning.convert.kernels.rounded_buffer import padded_shape

CAPABILITY = (9, 0)
"""The only compute capability: later GPUs have other instructions."""

FEWEST_TOKENS = 129
"""Below, the kernel for a warpgroup is faster: it splits the sum among blocks."""

_SHARED = 227 * 1024  # bytes that a block can have
_CHUNK, _BUFFERS = 64, 3  # tokens that a warpgroup stores at a time, and how many of these it has room for
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tiling:
    """How the work is cut up; the macros of ``kernel.cu`` in brackets.

    Attributes:
        tokens: of a tile (TOKENS), a multiple of 64.
        groups: warpgroups of a block, 64 rows of the weight each (GROUPS).
        across: neighbouring blocks along the rows that share their inputs (CR).
        panel: tiles along the tokens that are taken side by side (PANEL).
        beside: 1 if warps of the blocks round the tokens behind the first tiles while these are multiplied (BESIDE); 0
            if all tokens are rounded before.
    """

    tokens: int
    groups: int
    across: int
    panel: int
    beside: int = 0

    @property
    def rows(self) -> int:
        """Rows of the weight in a tile."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block: the warpgroups, one warp that loads, three that round."""
        return 128 * self.groups + 32 + 96 * self.beside

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a piece of 128 inputs: values, inputs, metadata."""
        return 64 * self.rows + 128 * self.tokens + 16 * self.rows

    @property
    def stages(self) -> int:
        """Pieces in shared memory (STAGES): as many as fit."""
        return (_SHARED - self._results_bytes) // (self.stage_bytes + 16)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages with two barriers each, results on their way, scales of the tokens."""
        return self.stages * (self.stage_bytes + 16) + self._results_bytes

    @property
    def _results_bytes(self) -> int:
        return self.groups * (_BUFFERS * _CHUNK * 128 + self.tokens * 4)

    @property
    def macros(self) -> dict[str, int]:
        """Macro -> value, for the compiler."""
        names = ("TOKENS", "GROUPS", "CR", "PANEL", "BESIDE")
        return {**dict(zip(names, astuple(self), strict=True)), "STAGES": self.stages}

    def first_tokens(self, row_tiles: int, clusters: int) -> int:
        """Return how many tokens the tiles take that so many clusters multiply first, ``row_tiles`` along the rows."""
        return self.tokens * max(self.panel, clusters // row_tiles)

    def cost(self, shape: tuple[int, int], tokens: int) -> float:
        """Return an estimate of the time, in no unit; it ranks tilings where nothing has been measured."""
        rows, _ = padded_shape(shape)
        tiles = -(-rows // (self.rows * self.across)) * -(-tokens // self.tokens)
        rounds = -(-tiles // (_MULTIPROCESSORS // self.across))
        return rounds * (self.rows * self.tokens + 64 * (self.rows + 2 * self.tokens / self.across))


TILINGS = tuple(
    Tiling(*numbers)
    for numbers in (
        *((256, 2, 2, 4, 1), (256, 2, 2, 8, 1), (256, 2, 2, 2, 1)),
        *((256, 2, 2, 4), (256, 2, 2, 8), (256, 2, 1, 8), (128, 2, 2, 8)),
    )
)
"""The tilings worth measuring: of some twenty, the fastest on some shape (H200), and a smaller one."""


def tilings(tokens: int, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Return the tilings to measure for ``tokens`` tokens; none below :data:`FEWEST_TOKENS` or on other GPUs."""
    return TILINGS if capability == CAPABILITY and tokens >= FEWEST_TOKENS else ()
