"""How the warpgroup kernel cuts up its work, and which tilings are worth measuring."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from prox24_lightning.convert.kernels.packed_buffer import padded_shape
from prox24_lightning.convert.kernels.rounded_buffer import padded_shape as rounded_shape

CAPABILITY = (9, 0)
"""The only compute capability: later GPUs have other instructions."""

MOST_TOKENS = 512
"""Above this, cuSPARSELt is faster."""

_AT_ONCE = 128  # up to so many tokens a block best takes them all
_SHARED = 227 * 1024  # bytes that a block can have
_MULTIPROCESSORS = 132
_MOST_STAGES = 12
_LONGEST_TOKEN = 16384  # inputs that a block rounds
_BOX = 8 * 256  # bytes that a piece of a rounded token takes: the products read it as one of eight tokens
# Bytes that could be loaded while a block starts, and while it adds the partial sums of another block of its cluster.
_START, _REDUCTION = 2**16, 2**15


@dataclass(frozen=True)
class Tiling:
    """How the work is cut up; the macros of ``kernel.cu`` in brackets.

    Attributes:
        tokens: tokens of a block (TOKENS).
        groups: warpgroups of a block, 64 rows of the weight each (GROUPS).
        across: neighbouring blocks along the rows that share their inputs (CR).
        cluster: blocks along the sum (CS).
        stages: pieces of 128 words of inputs in shared memory (STAGES): 128 inputs of 16 bits, or 256 of 8 bits.
        within: 1 if each block rounds the one token of a product in 8 bits (ONE); 0 if a kernel before it does.
    """

    tokens: int
    groups: int
    across: int
    cluster: int
    stages: int
    within: int = 0

    @property
    def rows(self) -> int:
        """Rows of the weight that a block takes."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block: the warpgroups, and one warp that loads."""
        return 128 * self.groups + 32

    def stage_bytes(self, *, rounded: bool = False) -> int:
        """Shared memory of a stage: values, inputs, metadata, of which a weight of 8 bits (``rounded``) has twice."""
        inputs = 0 if self.within else 256 * self.tokens
        return 128 * self.rows + inputs + (32 if rounded else 16) * self.rows

    def shared_bytes(self, *, rounded: bool = False) -> int:
        """Shared memory of a block: the stages, in the end the partial sums; then two barriers a stage, and scales."""
        stages = self.stages * self.stage_bytes(rounded=rounded)
        scales = 4 * (self.rows + self.tokens) if rounded else 0
        return max(stages, self.tokens * (self.rows + 4) * 4) + 16 * self.stages + scales

    def token_bytes(self, words: int) -> int:
        """Shared memory behind that, of a block that rounds a token of ``words`` words: the rest of a KiB, its part."""
        used = 16 * self.stages + 4 * (self.rows + self.tokens)
        return 1024 - used + -(-words // (128 * self.cluster)) * _BOX

    def for_token(self, shape: tuple[int, int], tokens: int) -> Tiling:
        """Return this tiling, but with the rounding before it if the blocks cannot round these tokens."""
        columns = rounded_shape(shape)[1]
        able = tokens == 1 and shape[1] % 8 == 0 and columns <= _LONGEST_TOKEN
        fits = self.shared_bytes(rounded=True) + self.token_bytes(columns // 2) <= _SHARED
        return self.without() if self.within and not (able and fits) else self

    def without(self) -> Tiling:
        """Return the same cuts, and as many stages as fit, for tokens that are rounded before the product."""
        return most_stages(*astuple(self)[:4], rounded=True)

    def cost(self, shape: tuple[int, int], tokens: int, *, rounded: bool = False) -> int:
        """Return an estimate in bytes loaded by a multiprocessor; it ranks tilings where nothing has been measured."""
        rows, columns = rounded_shape(shape) if rounded else padded_shape(shape)
        words = columns // 2 if rounded else columns
        blocks = -(-rows // (self.rows * self.across)) * self.across * self.cluster * -(-tokens // self.tokens)
        stages = -(-words // (128 * self.cluster)) * self.stage_bytes(rounded=rounded)
        return -(-blocks // _MULTIPROCESSORS) * (stages + _START + _REDUCTION * (self.cluster - 1))

    @property
    def macros(self) -> dict[str, int]:
        """Macro -> value, for the compiler."""
        numbers = dict(zip(("TOKENS", "GROUPS", "CR", "CS", "STAGES"), astuple(self), strict=False))
        return {**numbers, "ONE": self.within}


def most_stages(
    tokens: int, groups: int, across: int, cluster: int, resident: int = 1, *, rounded: bool = False
) -> Tiling:
    """Return the tiling with as many stages as fit if a multiprocessor holds ``resident`` blocks."""
    stage = Tiling(tokens, groups, across, cluster, 1).stage_bytes(rounded=rounded)
    return Tiling(tokens, groups, across, cluster, min(_MOST_STAGES, (_SHARED // resident - 1024) // (stage + 16)))


TILINGS = tuple(
    most_stages(tokens, *numbers)
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
"""The tilings worth measuring: of some fifty, the fastest for each number of tokens on some shape (H200)."""

ROUNDED_TILINGS = (
    *(
        Tiling(8, groups, 1, cluster, stages, 1)
        for groups, cluster, stages in ((1, 2, 12), (1, 1, 8), (1, 4, 4), (2, 1, 6), (2, 2, 7))
    ),
    *(
        most_stages(tokens, *numbers, rounded=True)
        for tokens, cuts in (
            (8, ((2, 1, 1, 2), (2, 1, 1), (1, 1, 1, 2), (1, 1, 2), (1, 1, 2, 2), (2, 1, 2, 2))),
            (16, ((2, 1, 1, 2), (2, 1, 1), (1, 1, 1), (1, 1, 2), (1, 1, 2, 2), (2, 2, 1, 2))),
            (32, ((2, 1, 1), (2, 1, 2), (1, 1, 2), (1, 1, 2, 2), (2, 2, 1, 2), (2, 1, 3))),
            (64, ((2, 1, 1), (2, 1, 2), (2, 4, 1), (1, 1, 2), (1, 1, 2, 2), (1, 1, 1, 2))),
            (128, ((2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 3))),
            (256, ((2, 1, 1), (1, 1, 2))),
        )
        for numbers in cuts
    ),
)
"""Those of a weight of 8 bits: of some seventy, the fastest or nearly so on some shape (H200)."""


def tilings(tokens: int, capability: tuple[int, int], *, rounded: bool = False) -> tuple[Tiling, ...]:
    """Return the tilings to measure for ``tokens`` tokens; none above :data:`MOST_TOKENS` or on other GPUs than Hopper.

    They are the smallest that take all tokens at once; above 128 tokens also those that take 128 at a time, and up to
    8 also those for 16 whose neighbours share their inputs, eight tokens each.
    """
    if capability != CAPABILITY or tokens > MOST_TOKENS:
        return ()
    known = tuple(each for each in ROUNDED_TILINGS if not each.within or tokens == 1) if rounded else TILINGS
    sizes = {tiling.tokens for tiling in known}
    least = min((size for size in sizes if size >= tokens), default=max(sizes))
    shared = 2 * least if least == min(sizes) else 0
    return tuple(
        tiling
        for tiling in known
        if tiling.tokens in (least, min(least, _AT_ONCE)) or (tiling.tokens == shared and tiling.across > 1)
    )
