"""Choose the kernel of a layer at each number of tokens, from measured times or by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prox24_lightning.convert.kernels.dense_fp8.kernel import AFTERWARDS, BY_ROWS
from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.many_tokens.tiling import tilings as many_tokens_tilings
from prox24_lightning.convert.kernels.registry import Kernel, KernelName
from prox24_lightning.convert.kernels.warpgroup.tiling import tilings as warpgroup_tilings
from prox24_lightning.weights.rounding import RoundedForm

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of tokens at which layers are measured; a call uses the next one above its own number."""

DENSE = Kernel("dense")

SAME = 0.98
"""A speed-up above this counts as no slower: two measurements of one kernel differ by as much."""

TINY = 2**18
"""Weights of a layer below which a gain cannot be seen: any of these GPUs reads so few in the microsecond or two that
starting a kernel takes."""

_FEW_DENSE_FP8_TOKENS = 256  # without measurements, a dense float8 weight takes its scales afterwards up to here
_FEW_TOKENS = 64  # without measurements, few_tokens runs up to here
_FEW_ROUNDED_TOKENS = 256  # and on Hopper the kernel for a warpgroup up to here, if the weight has 8 bits


@dataclass(frozen=True)
class KernelTimes:
    """Microseconds of a layer at one number of tokens, replayed from a CUDA graph with its weight not in the cache.

    Attributes:
        tokens: rows of the input.
        dense_us: cuBLAS on the dense weight.
        kernels: text of a kernel -> its time.
        notes: what could not be measured, and why.
        dense_fp8_us: a dense float8 weight, the fastest way, with the rounding of the tokens; None on a GPU without.
        dense_fp8_kernel: text of that way; "" if it is not known.
    """

    tokens: int
    dense_us: float
    kernels: Mapping[str, float]
    notes: tuple[str, ...] = ()
    dense_fp8_us: float | None = None
    dense_fp8_kernel: str = ""


@dataclass(frozen=True)
class TableRow:
    """The kernel up to a number of tokens; the times (microseconds) are None where not measured."""

    tokens: int
    kernel: Kernel
    us: float | None = None
    dense_us: float | None = None
    notes: tuple[str, ...] = ()
    dense_fp8_us: float | None = None
    dense_fp8_kernel: Kernel | None = None

    @property
    def speedup(self) -> float | None:
        """Dense time over the kernel's time."""
        return None if self.us is None or self.dense_us is None else self.dense_us / self.us

    @property
    def speedup_over_fp8(self) -> float | None:
        """Time of the dense float8 weight over the kernel's time."""
        return None if self.us is None or self.dense_fp8_us is None else self.dense_fp8_us / self.us


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one shape, ascending in tokens; the last row serves larger numbers too.

    Attributes:
        shape: (out_features, in_features).
        rows: see :class:`TableRow`.
        form: of a weight of 8 bits; None for 16 bits.
        joined: names of the layers that decoding runs as one product of this shape; "" for a layer of its own.
    """

    shape: tuple[int, int]
    rows: tuple[TableRow, ...]
    form: RoundedForm | None = None
    joined: str = ""

    @property
    def text(self) -> str:
        """The table as the operator's argument; neighbours with one kernel share an entry."""
        return _text([(row.tokens, row.kernel) for row in self.rows])

    @property
    def dense_fp8_text(self) -> str:
        """The same of a dense float8 weight; by rule where no way of multiplying it has been measured."""
        return _text([(row.tokens, row.dense_fp8_kernel or dense_fp8_by_rule(row.tokens)) for row in self.rows])

    def slower(self, token_counts: Sequence[int]) -> tuple[TableRow, ...]:
        """Return the rows at which the layer would be slower than dense in 16 bits."""
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


def choose(
    shape: tuple[int, int],
    times: Sequence[KernelTimes],
    *,
    keep_dense: bool = False,
    form: RoundedForm | None = None,
) -> KernelTable:
    """Choose the fastest kernel at each number of tokens; the dense one only if its weight is kept and nothing wins.

    With a dense weight, a packed kernel must be faster by more than two measurements of one kernel differ.

    Raises:
        ValueError: if no packed kernel could be measured at one of them, with the reasons.
    """
    rows = []
    for entry in sorted(times, key=lambda entry: entry.tokens):
        fp8 = entry.dense_fp8_us, Kernel.parse(entry.dense_fp8_kernel) if entry.dense_fp8_kernel else None
        ranked = sorted(entry.kernels.items(), key=lambda item: item[1])
        if ranked and not (keep_dense and entry.dense_us * SAME <= ranked[0][1]):
            text, us = ranked[0]
            kernel = Kernel.parse(text)
            rows.append(TableRow(entry.tokens, kernel, us, entry.dense_us, entry.notes, *fp8))
        elif keep_dense:
            us = entry.dense_us
            rows.append(TableRow(entry.tokens, DENSE, us, us, entry.notes, *fp8))
        else:
            why = "; ".join(entry.notes) or "none fits"
            raise ValueError(f"no packed kernel runs for {shape} at {entry.tokens} tokens: {why}")
    return KernelTable(shape, tuple(rows), form)


def table_by_rule(
    shape: tuple[int, int],
    capability: tuple[int, int],
    many_tokens: KernelName = "cusparselt",
    *,
    own: bool = True,
    form: RoundedForm | None = None,
) -> KernelTable:
    """Return a table without measurements: the package's kernels up to some hundreds of tokens, a library's above.

    Args:
        shape: (out_features, in_features).
        capability: the GPU's compute capability.
        many_tokens: from :func:`~prox24_lightning.convert.kernels.cusparselt.bindings.support`.
        own: whether the package's kernels can be compiled here; else ``many_tokens`` takes every number of tokens.
        form: of a weight of 8 bits; None for 16 bits.
    """
    found = {tokens: _by_rule(shape, tokens, capability, form) for tokens in BUCKETS} if own else {}
    rows = [TableRow(tokens, kernel) for tokens, kernel in found.items() if kernel is not None]
    if not rows or rows[-1].tokens != BUCKETS[-1]:
        rows.append(TableRow(BUCKETS[-1], Kernel(many_tokens)))
    return KernelTable(shape, tuple(rows), form)


def _by_rule(
    shape: tuple[int, int], tokens: int, capability: tuple[int, int], form: RoundedForm | None
) -> Kernel | None:
    rounded = form is not None
    if rounded and tokens > _FEW_ROUNDED_TOKENS and (many := many_tokens_tilings(tokens, capability)):
        return Kernel.many(min(many, key=lambda tiling: tiling.cost(shape, tokens)))
    if warpgroup := warpgroup_tilings(tokens, capability, rounded=rounded):
        return Kernel.warpgroup(min(warpgroup, key=lambda tiling: tiling.cost(shape, tokens, rounded=rounded)))
    tilings = few_tokens_tilings(tokens, capability, form) if tokens <= _FEW_TOKENS else ()
    return Kernel.few(tilings[0]) if tilings else None


def dense_fp8_by_rule(tokens: int) -> Kernel:
    """Return the way of multiplying a dense float8 weight without measurements."""
    return Kernel("dense_fp8", (AFTERWARDS if tokens <= _FEW_DENSE_FP8_TOKENS else BY_ROWS,))


def completed(measured: Sequence[TableRow], by_rule: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """Return the measured rows, and those by rule for numbers of tokens that have not been measured."""
    known = {row.tokens for row in measured}
    rows = (*measured, *(row for row in by_rule if row.tokens not in known))
    return tuple(sorted(rows, key=lambda row: row.tokens))


def _text(kernels: Sequence[tuple[int, Kernel]]) -> str:
    """Return a table of tokens and kernels as text; neighbours with one kernel share an entry."""
    after = [kernel for _, kernel in kernels[1:]]
    kept = [entry for entry, kernel in zip(kernels, [*after, None], strict=True) if entry[1] != kernel]
    return " ".join(f"{tokens}={kernel}" for tokens, kernel in kept)
