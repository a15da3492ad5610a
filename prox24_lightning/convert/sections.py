"""Tables of text with a title, in Markdown or in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.utils.names import collapse_names, shorten_all

Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header, rows."""

NAMES, TEXT = 26, 20
"""Characters that names of layers, and sentences, get at least in a narrow console."""


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
    """Print tables, then notes, within the width of the console.

    Names of layers are cut in the middle, one on a line. A table that is too wide is printed in parts, which all begin
    with the columns that tell its rows apart.
    """
    for title, header, rows in tables:
        for number, columns in enumerate(_parts(header, rows, console.width)):
            console.print(_table("" if number else title, header, rows, columns, console.width))
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _table(
    title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], columns: Sequence[int], width: int
) -> Table:
    table = Table(title=title, title_justify="left")
    room = width - 4 - sum(_width(header, rows, j) + 3 for j in columns if j != 0)
    first = [row[0] for row in rows]
    if header[0] == "layers":
        first = _one_a_line(first, room)
    for j in columns:
        if header[0] == "layers" and j == 0:
            table.add_column(header[j], overflow="fold", no_wrap=True)
        elif _is_text(rows, j):
            table.add_column(header[j], overflow="fold")
        else:
            fits = len(header[j]) <= max((len(row[j]) for row in rows), default=0)
            table.add_column(header[j] if fits else header[j].replace(" ", "\n"), overflow="fold", no_wrap=True)
    for name, row in zip(first, rows, strict=True):
        table.add_row(*(Text(name if j == 0 else row[j]) for j in columns))
    return table


def _parts(header: tuple[str, ...], rows: list[tuple[str, ...]], width: int) -> list[list[int]]:
    """Return the columns of each part of a table; those that tell the rows apart are in all of them."""
    keys = next((k for k in range(1, len(header)) if len({row[:k] for row in rows}) == len(rows)), 1)
    widths = [_width(header, rows, j) + 3 for j in range(len(header))]
    first = 1 + sum(widths[:keys])
    parts: list[list[int]] = [[]]
    used = first
    for j in range(keys, len(header)):
        if parts[-1] and used + widths[j] > width:
            parts.append([])
            used = first
        parts[-1].append(j)
        used += widths[j]
    return [[*range(keys), *part] for part in parts]


def _width(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], j: int) -> int:
    """Return the characters that a column needs: all of a number, as much of a text as can be read."""
    cells = [row[j] for row in rows]
    if header[0] == "layers" and j == 0:
        cells = [piece for cell in cells for piece in cell.split(", ")]
        return max(len(header[j]), min(NAMES, max(map(len, cells), default=0)))
    longest = max(map(len, cells), default=0)
    if _is_text(rows, j):
        return max(TEXT, max((len(word) for cell in cells for word in cell.split()), default=0))
    return max(*map(len, header[j].split()), longest, 1)


def _is_text(rows: Sequence[tuple[str, ...]], j: int) -> bool:
    return any(len(row[j]) > TEXT and " " in row[j] for row in rows)


def _one_a_line(cells: Sequence[str], width: int) -> list[str]:
    """Return cells with their names one on a line, each cut in the middle, its count whole."""
    pieces = [[piece.partition(" x ") for piece in cell.split(", ")] for cell in cells]
    counts = max((len(times + count) for each in pieces for _, times, count in each), default=0)
    short = shorten_all((name for each in pieces for name, _, _ in each), max(8, width - counts))
    return ["\n".join(short[name] + times + count for name, times, count in each) for each in pieces]
