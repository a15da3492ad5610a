"""The study on disk: one CSV a table, every figure as PNG and SVG, and a Markdown report over all of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_lightning.utils.environment import describe_environment
from prox24_lightning.utils.files import replacing, write_text
from prox24_lightning.utils.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass
class Part:
    """One part of the study's report.

    Attributes:
        name: of its files.
        title: its heading.
        text: the question and the results, one paragraph each.
        shown: heading -> rows of a table in the report.
        tables: name -> rows of a CSV file.
        figure: written as PNG and SVG, or None.
        seconds: wall time.
    """

    name: str
    title: str
    text: list[str]
    shown: dict[str, list[Row]] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    figure: Figure | None = None
    seconds: float = 0.0


def paragraph(*sentences: str) -> str:
    """Return the sentences as one paragraph."""
    return " ".join(sentences)


def write_study(folder: Path, parts: Sequence[Part], settings: Row) -> Path:
    """Write ``report.md`` with its figures and tables into ``folder``; return the report's path."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# prox24 study", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for paragraph in part.text:
            lines += [paragraph, ""]
        if part.figure is not None:
            for ending in ("png", "svg"):
                with (
                    rc_context({"svg.hashsalt": part.name}),  # names inside the file, random otherwise
                    replacing(folder / f"{part.name}.{ending}") as temporary,
                ):
                    part.figure.savefig(temporary, metadata=_undated(ending))
            lines += [f"![{part.title}]({part.name}.png)", ""]
        for heading, rows in part.shown.items():
            lines += [f"**{heading}**", "", markdown_table(list(rows[0]), (row.values() for row in rows)), ""]
        for name, rows in part.tables.items():
            write_csv(folder / f"{name}.csv", rows)
        files = ", ".join(f"`{name}.csv`" for name in part.tables)
        lines += [f"{part.seconds:.0f} s. All numbers: {files}." if files else f"{part.seconds:.0f} s.", ""]
    facts = {**settings, **describe_environment()}
    lines += ["## How it was run", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    path = folder / "report.md"
    write_text(path, "\n".join(lines))
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that share their keys as CSV, numbers in full."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _undated(ending: str) -> dict[str, Any]:
    """Return metadata without date and version, so that equal figures give equal files."""
    return {"Date": None} if ending == "svg" else {"Software": None}
