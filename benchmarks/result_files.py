"""Result files of the benchmarks: a dated Markdown table and the same numbers as JSON, with machine and versions.

``python -m benchmarks.result_files`` rewrites the index, ``results/README.md``, which links the newest of each kind.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from prox24_lightning.utils.environment import describe_environment
from prox24_lightning.utils.files import write_text
from prox24_lightning.utils.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
COLUMN_GAP = 2
"""Characters that rich puts between the columns of a Markdown table."""


def machine() -> dict[str, str]:
    """Return where and with what the numbers were taken, and the command."""
    return {**describe_environment(), "command": shlex.join(["python", *_arguments()])}


def result_path(folder: Path, name: str, ending: str, *, part: str = "") -> Path:
    """Return the path of today's result: ``folder/BENCHMARK/DATE[_VARIANT][_PART]ENDING``.

    Args:
        folder: of all results.
        name: ``"BENCHMARK"`` or ``"BENCHMARK/VARIANT"``.
        ending: of the file, with its dot.
        part: one of several files of the same run.
    """
    benchmark, _, variant = name.partition("/")
    words = [word for word in (date.today().isoformat(), variant, part) if word]
    return folder / benchmark / f"{'_'.join(words)}{ending}"


def write_result(
    folder: Path,
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    *,
    part: str = "",
    note: str = "",
    quiet: bool = False,
) -> Path:
    """Write the ``.md`` and ``.json`` of :func:`result_path`, print the table unless ``quiet``; return the first."""
    facts = machine()
    table = markdown_table(list(rows[0]), (row.values() for row in rows))
    text = f"# {title}\n\n{note}\n\n{table}\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items())
    path = result_path(folder, name, ".md", part=part)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    content = json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1)
    write_text(result_path(folder, name, ".json", part=part), content)
    if not quiet:
        print_whole(text, table)
    return path


def print_whole(text: str, table: str) -> None:
    """Print Markdown in a width in which no cell of ``table``, a part of it, is cut: a log may be all that is left."""
    rows = [line.split(" | ") for line in table.splitlines()]
    needed = sum(max(len(cell) for cell in column) + COLUMN_GAP for column in zip(*rows, strict=True))
    console = Console()
    console.width = max(console.width, needed + COLUMN_GAP)
    console.print(Markdown(text))


def index(folder: Path = RESULTS) -> str:
    """Return the text of ``README.md`` in ``folder``: the newest result of each benchmark and variant, linked."""
    rows = []
    for benchmark in sorted(path for path in folder.iterdir() if path.is_dir()):
        newest: dict[str, Path] = {}
        for path in sorted([*benchmark.glob("????-??-??*.md"), *benchmark.glob("????-??-??*/report.md")]):
            stem = path.stem if path.parent == benchmark else path.parent.name
            newest[stem[len("2000-01-01_") :]] = path
        for variant, path in sorted(newest.items()):
            target = path.relative_to(folder).as_posix()
            if not variant.endswith("before"):
                rows.append((benchmark.name, variant.replace("_", " "), f"[{target}]({target})"))
    return (
        "# Results\n\nThe newest result of each benchmark. Older files (earlier dates, and names that end in `before`) "
        "are kept where a text refers to them.\n\n" + markdown_table(["benchmark", "variant", "newest"], rows) + "\n"
    )


def _arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]] if spec else sys.argv


if __name__ == "__main__":
    write_text(RESULTS / "README.md", index())
