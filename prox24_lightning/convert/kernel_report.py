"""Print which kernel runs when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from prox24_lightning.convert.autotune.kernel_table import SAME, KernelTable, TableRow
from prox24_lightning.convert.kernels.registry import Kernel
from prox24_lightning.convert.sections import Section, print_tables

_WORDS = {
    "dense": "cuBLAS, dense weight kept",
    "dense_fp8": "dense in float8, way {}",
    "few": "own kernel, tiling {}",
    "warpgroup": "own kernel for warpgroups, tiling {}",
    "many": "own kernel for many tokens, tiling {}",
    "cusparselt": "cuSPARSELt, algorithm {}",
    "torch": "torch's operator",
    "expand": "expanded, then cuBLAS",
}


def kernel_section(tables: Sequence[KernelTable]) -> Section:
    """Return a row for each shape and number of tokens: the kernel, its time beside the dense ones, and notes.

    Dense float8 has columns of its own, "not measured" where the GPU has none. Layers that decoding runs as one product
    are named beside its shape.
    """
    rows = [(_shape_cell(table), table.form or "16 bits", *_cells(row)) for table in tables for row in table.rows]
    times = ("us", "dense us", "x", "dense fp8 us", "x over fp8")
    return ("Kernels", ("(out, in)", "weights", "up to tokens", "kernel", *times, "note"), rows)


def print_kernels(tables: Iterable[KernelTable], console: Console | None = None) -> None:
    """Print which kernel runs when, and the reasons of what could not be measured."""
    print_tables([kernel_section(list(tables))], (), console or Console())


def in_words(kernel: Kernel) -> str:
    """Return a kernel in words."""
    return _WORDS[kernel.name].format(",".join(map(str, kernel.config)) or "by default")


def _shape_cell(table: KernelTable) -> str:
    return f"{table.shape} as one: {table.joined}" if table.joined else str(table.shape)


def _cells(row: TableRow) -> tuple[str, ...]:
    notes = list(row.notes)
    if row.speedup is not None and row.speedup < SAME:
        notes.insert(0, "slower than dense: no packed kernel is faster here, and no dense weight is kept")
    cells = ["-" if value is None else f"{value:.2f}" for value in (row.us, row.dense_us, row.speedup)]
    for value in (row.dense_fp8_us, row.speedup_over_fp8):
        cells.append("not measured" if value is None else f"{value:.2f}")
    return str(row.tokens), in_words(row.kernel), *cells, "; ".join(notes)
