"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        header: column titles.
        rows: cells of each row. Floats are written to four significant digits; ``|`` and line breaks are escaped.

    Raises:
        ValueError: if a row has more or fewer cells than the header.
    """
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [format_cell(cell) for cell in row]
        if len(cells) != len(header):
            raise ValueError(f"the row {cells} has {len(cells)} cells, but the table has {len(header)} columns")
        lines.append(_line(cells))
    return "\n".join(lines)


def format_cell(value: Any) -> str:
    """Return a cell's text: floats to four significant digits, anything else as ``str`` writes it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
