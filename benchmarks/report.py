"""Result files of the benchmarks: a dated Markdown table and the same numbers as JSON, with machine and versions."""

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


def machine() -> dict[str, str]:
    """Return where and with what the numbers were taken, and the command."""
    return {**describe_environment(), "command": shlex.join(["python", *_arguments()])}


def write_report(
    folder: Path, name: str, title: str, rows: Sequence[dict[str, Any]], *, note: str = "", quiet: bool = False
) -> Path:
    """Write ``<date>_<name>.md`` and ``.json`` into ``folder``, print the table unless ``quiet``; return the first."""
    facts = machine()
    table = markdown_table(list(rows[0]), (row.values() for row in rows))
    text = f"# {title}\n\n{note}\n\n{table}\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today().isoformat()}_{name}.md"
    write_text(path, text + "\n")
    write_text(path.with_suffix(".json"), json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1))
    if not quiet:
        Console().print(Markdown(text))
    return path


def _arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]] if spec else sys.argv
