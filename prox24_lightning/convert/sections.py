"""Tables of text with a title, in Markdown or in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.utils.names import collapse_names

Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header, rows."""


def grouped(rows: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Merge (name, cells) rows with equal cells into one row: the names, then the cells."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        groups.setdefault(cells, []).append(name)
    return [(collapse_names(names), *cells) for cells, names in groups.items()]


def markdown_lines(tables: Sequence[Section]) -> list[str]:
    """Return Markdown lines of tables, each under its title."""
    lines: list[str] = []
    for title, header, rows in tables:
        lines += [f"## {title}", "", markdown_table(header, rows), ""]
    return lines


def print_tables(tables: Sequence[Section], notes: Sequence[str], console: Console) -> None:
    """Print tables, then notes."""
    for title, header, rows in tables:
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
