"""The table of weights that become 2:4 or stay dense, printed when a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from prox24_lightning.utils.names import numbers_as_wildcards
from prox24_lightning.weights.selection import Selection


def selection_table(selection: Selection, title: str) -> Table:
    """Return one row a kind of weight: repeated blocks (``layers.0``, ``layers.1``, ...) share a row."""
    table = Table(title=title, title_justify="left")
    for column, justify in (("weight", "left"), ("", "right"), ("shape", "left"), ("decision", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    chosen = ((weight.name, tuple(weight.parameter.shape), "2:4") for weight in selection.chosen)
    skipped = ((weight.name, weight.shape, f"dense: {weight.reason}") for weight in selection.skipped)
    for style, rows in (("green", _collapsed(chosen)), ("dim", _collapsed(skipped))):
        for (name, shape, decision), count in rows.items():
            times = f"x {count}" if count > 1 else ""
            table.add_row(name, times, " x ".join(map(str, shape)), decision, style=style)
    return table


def _collapsed(rows: Iterable[tuple[str, tuple[int, ...], str]]) -> dict[tuple[str, tuple[int, ...], str], int]:
    """Count rows that differ in the numbers of their names only, under a name with ``*`` for the numbers."""
    counts: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, shape, decision in rows:
        key = (numbers_as_wildcards(name), shape, re.sub(r"\.\d+\b", ".*", decision))
        counts.setdefault(key, []).append(name)
    return {(key[0] if len(names) > 1 else names[0], key[1], key[2]): len(names) for key, names in counts.items()}


@rank_zero_only
def print_selection(selection: Selection, title: str) -> None:
    """Print :func:`selection_table` on the first rank."""
    Console().print(selection_table(selection, title))
