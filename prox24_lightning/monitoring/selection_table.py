"""The table of weights that become 2:4 or stay dense, printed when a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from prox24_lightning.utils.names import numbers_as_wildcards, shorten_all
from prox24_lightning.weights.selection import Selection

_OTHERS = 46
"""Characters of a row beside the name: count, shape, borders, and what a reason needs to be read."""


def selection_table(selection: Selection, title: str, width: int = 80) -> Table:
    """Return one row a kind of weight: repeated blocks (``layers.0``, ``layers.1``, ...) share a row.

    The table is ``width`` characters wide at most: names are cut in the middle.
    """
    chosen = ((weight.name, tuple(weight.parameter.shape), "2:4") for weight in selection.chosen)
    skipped = ((weight.name, weight.shape, f"dense: {weight.reason}") for weight in selection.skipped)
    kinds = (("green", _collapsed(chosen)), ("dim", _collapsed(skipped)))
    short = shorten_all((name for _, rows in kinds for name, _, _ in rows), max(20, width - _OTHERS))
    repeated = any(count > 1 for _, rows in kinds for count in rows.values())
    table = Table(title=title, title_justify="left")
    table.add_column("weight", no_wrap=True)
    if repeated:
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("decision", overflow="fold")
    for style, rows in kinds:
        for (name, shape, decision), count in rows.items():
            times = [f"x {count}" if count > 1 else ""] if repeated else []
            table.add_row(short[name], *times, " x ".join(map(str, shape)), decision, style=style)
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
    console = Console()
    console.print(selection_table(selection, title, console.width))
