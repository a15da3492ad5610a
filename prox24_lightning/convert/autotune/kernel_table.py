"""Choose the kernel of a layer at each number of tokens, from measured times or by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.registry import Kernel, KernelName
from prox24_lightning.convert.kernels.warpgroup.tiling import tilings as warpgroup_tilings

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of tokens at which layers are measured; a call uses the next one above its own number."""

DENSE = Kernel("dense")

SAME = 0.98
"""A speed-up above this counts as no slower: two measurements of one kernel differ by as much."""

_FEW_TOKENS = 64  # without measurements, few_tokens runs up to here


@dataclass(frozen=True)
class KernelTimes:
    """Microseconds of a layer at one number of tokens, replayed from a CUDA graph with its weight not in the cache.

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
class TableRow:
    """The kernel up to a number of tokens; ``us`` and ``dense_us`` (microseconds) are None where not measured."""

    tokens: int
    kernel: Kernel
    us: float | None = None
    dense_us: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Dense time over the kernel's time."""
        return None if self.us is None or self.dense_us is None else self.dense_us / self.us


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one shape, ascending in tokens; the last row serves larger numbers too."""

    shape: tuple[int, int]
    rows: tuple[TableRow, ...]

    @property
    def text(self) -> str:
        """The table as the operator's argument; neighbours with one kernel share an entry."""
        kept = [row for row, after in zip(self.rows, [*self.rows[1:], None], strict=True) if _differs(row, after)]
        return " ".join(f"{row.tokens}={row.kernel}" for row in kept)

    def slower(self, token_counts: Sequence[int]) -> tuple[TableRow, ...]:
        """Return the rows at which the layer would be slower than dense."""
        rows = (row for row in self.rows if row.tokens in token_counts)
        return tuple(row for row in rows if row.speedup is not None and row.speedup < SAME)

    def decision(self, token_counts: Sequence[int]) -> str | None:
        """Return why a layer used at these numbers of tokens stays dense; None if it becomes sparse."""
        if all(row.kernel == DENSE for row in self.rows if row.tokens in token_counts):
            return "no packed kernel is faster at any of these numbers of tokens: stays dense"
        if slower := self.slower(token_counts):
            where = ", ".join(f"{row.speedup:.2f} x at {row.tokens}" for row in slower)
            return f"slower ({where} tokens; keep_dense=True would use cuBLAS there): stays dense"
        return None


def choose(shape: tuple[int, int], times: Sequence[KernelTimes], *, keep_dense: bool = False) -> KernelTable:
    """Choose the fastest kernel at each number of tokens; the dense one only if its weight is kept and nothing wins.

    With a dense weight, a packed kernel must be faster by more than two measurements of one kernel differ.

    Raises:
        ValueError: if no packed kernel could be measured at one of them, with the reasons.
    """
    rows = []
    for entry in sorted(times, key=lambda entry: entry.tokens):
        ranked = sorted(entry.kernels.items(), key=lambda item: item[1])
        if ranked and not (keep_dense and entry.dense_us * SAME <= ranked[0][1]):
            text, us = ranked[0]
            rows.append(TableRow(entry.tokens, Kernel.parse(text), us, entry.dense_us, entry.notes))
        elif keep_dense:
            rows.append(TableRow(entry.tokens, DENSE, entry.dense_us, entry.dense_us, entry.notes))
        else:
            why = "; ".join(entry.notes) or "none fits"
            raise ValueError(f"no packed kernel runs for {shape} at {entry.tokens} tokens: {why}")
    return KernelTable(shape, tuple(rows))


def table_by_rule(
    shape: tuple[int, int], capability: tuple[int, int], many_tokens: KernelName = "cusparselt", *, own: bool = True
) -> KernelTable:
    """Return a table without measurements: the package's kernels up to some hundreds of tokens, a library's above.

    Args:
        shape: (out_features, in_features).
        capability: the GPU's compute capability.
        many_tokens: from :func:`~prox24_lightning.convert.kernels.cusparselt.bindings.support`.
        own: whether the package's kernels can be compiled here; else ``many_tokens`` takes every number of tokens.
    """
    rows = [TableRow(BUCKETS[-1], Kernel(many_tokens))]
    for tokens in reversed(BUCKETS):
        if own and (kernel := _by_rule(shape, tokens, capability)) is not None:
            rows.insert(0, TableRow(tokens, kernel))
    return KernelTable(shape, tuple(rows))


def _by_rule(shape: tuple[int, int], tokens: int, capability: tuple[int, int]) -> Kernel | None:
    if warpgroup := warpgroup_tilings(tokens, capability):
        return Kernel.warpgroup(min(warpgroup, key=lambda tiling: tiling.cost(shape, tokens)))
    tilings = few_tokens_tilings(tokens, capability) if tokens <= _FEW_TOKENS else ()
    return Kernel.few(tilings[0]) if tilings else None


def completed(measured: Sequence[TableRow], by_rule: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """Return the measured rows, and those by rule for numbers of tokens that have not been measured."""
    known = {row.tokens for row in measured}
    rows = (*measured, *(row for row in by_rule if row.tokens not in known))
    return tuple(sorted(rows, key=lambda row: row.tokens))


def _differs(row: TableRow, after: TableRow | None) -> bool:
    return after is None or row.kernel != after.kernel
