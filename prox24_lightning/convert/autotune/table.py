"""Which kernel runs a layer at which number of tokens: the choice itself, from measured times or by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prox24_lightning.convert.kernels.few_tokens import kernel as few_tokens
from prox24_lightning.convert.kernels.registry import Kernel, Way
from prox24_lightning.convert.kernels.warpgroup import kernel as warpgroup

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of tokens at which layers are measured; a call goes by the next one above its own number."""

DENSE = Kernel("dense")

SAME = 0.98
"""A speed-up above this counts as no slower: two measurements of one kernel differ by as much."""

_FEW_TOKENS = 64  # without measurements, the kernel for few tokens up to here


@dataclass(frozen=True)
class Times:
    """Microseconds of a layer at one number of tokens, replayed from a CUDA graph, its weight out of the cache.

    Attributes:
        tokens: rows of the input.
        dense_us: cuBLAS on the dense weight.
        kernels: text of a kernel -> its time.
        notes: what could not be measured, and why.
    """

    tokens: int
    dense_us: float
    kernels: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a table; ``us`` and ``dense_us`` are None where nothing was measured."""

    tokens: int
    kernel: Kernel
    us: float | None = None
    dense_us: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        return None if self.us is None or self.dense_us is None else self.dense_us / self.us


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one shape, ascending in tokens; the last row serves larger numbers too."""

    shape: tuple[int, int]
    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        """For the operator; neighbours with one kernel share an entry."""
        kept = [row for row, after in zip(self.rows, [*self.rows[1:], None], strict=True) if _differs(row, after)]
        return " ".join(f"{row.tokens}={row.kernel}" for row in kept)

    def slower(self, token_counts: Sequence[int]) -> tuple[Row, ...]:
        """Where the layer would be slower than the dense one: nothing packed wins, and no dense weight is kept."""
        rows = (row for row in self.rows if row.tokens in token_counts)
        return tuple(row for row in rows if row.speedup is not None and row.speedup < SAME)

    def decision(self, token_counts: Sequence[int]) -> str | None:
        """Why a layer used at these numbers of tokens stays dense; None if it is to be sparse."""
        if all(row.kernel == DENSE for row in self.rows if row.tokens in token_counts):
            return "no packed kernel is faster at any of these numbers of tokens: stays dense"
        if slower := self.slower(token_counts):
            where = ", ".join(f"{row.speedup:.2f} x at {row.tokens}" for row in slower)
            return f"slower ({where} tokens; keep_dense=True would use cuBLAS there): stays dense"
        return None


def choose(shape: tuple[int, int], times: Sequence[Times], *, keep_dense: bool = False) -> KernelTable:
    """The fastest kernel at each number of tokens; the dense one only if its weight is kept, and where nothing wins.

    Where both are there, a packed kernel must be faster by more than two measurements of one kernel differ.

    Raises:
        ValueError: if no packed kernel could be measured at one of them, with the reasons.
    """
    rows = []
    for entry in sorted(times, key=lambda entry: entry.tokens):
        ranked = sorted(entry.kernels.items(), key=lambda item: item[1])
        if ranked and not (keep_dense and entry.dense_us * SAME <= ranked[0][1]):
            text, us = ranked[0]
            rows.append(Row(entry.tokens, Kernel.parse(text), us, entry.dense_us, entry.notes))
        elif keep_dense:
            rows.append(Row(entry.tokens, DENSE, entry.dense_us, entry.dense_us, entry.notes))
        else:
            why = "; ".join(entry.notes) or "none fits"
            raise ValueError(f"no packed kernel runs for {shape} at {entry.tokens} tokens: {why}")
    return KernelTable(shape, tuple(rows))


def unmeasured(
    shape: tuple[int, int], capability: tuple[int, int], large: Way = "cusparselt", *, own: bool = True
) -> KernelTable:
    """A table by rule: the package's kernels up to some hundreds of tokens, ``large`` above.

    Args:
        shape: (out_features, in_features).
        capability: the GPU's compute capability.
        large: see :func:`~prox24_lightning.convert.kernels.cusparselt.library.way`.
        own: whether the package's kernels can be compiled here; else ``large`` takes every number of tokens.
    """
    rows = [Row(BUCKETS[-1], Kernel(large))]
    for tokens in reversed(BUCKETS):
        if own and (kernel := _by_rule(shape, tokens, capability)) is not None:
            rows.insert(0, Row(tokens, kernel))
    return KernelTable(shape, tuple(rows))


def _by_rule(shape: tuple[int, int], tokens: int, capability: tuple[int, int]) -> Kernel | None:
    if blockings := warpgroup.blockings(tokens, capability):
        return Kernel.warpgroup(min(blockings, key=lambda blocking: blocking.cost(shape, tokens)))
    tilings = few_tokens.tilings(tokens, capability) if tokens <= _FEW_TOKENS else ()
    return Kernel.few(tilings[0]) if tilings else None


def completed(measured: Sequence[Row], by_rule: Sequence[Row]) -> tuple[Row, ...]:
    """The measured rows, and of the others those for numbers of tokens that have not been measured."""
    known = {row.tokens for row in measured}
    rows = (*measured, *(row for row in by_rule if row.tokens not in known))
    return tuple(sorted(rows, key=lambda row: row.tokens))


def _differs(row: Row, after: Row | None) -> bool:
    return after is None or row.kernel != after.kernel
