"""Result files of the benchmarks: a dated Markdown table and the same numbers as JSON, with machine and versions."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from prox24_lightning.utils.environment import commit, processor
from prox24_lightning.utils.files import write_text

PACKAGES = ("torch", "lightning", "transformers", "triton", "numpy")


def machine() -> dict[str, str]:
    """Where and with what the numbers were taken."""
    facts = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["commit"] = commit()
    facts["command"] = shlex.join(["python", *_arguments()])
    return facts


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; floats to four significant digits."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_report(
    folder: Path, name: str, title: str, rows: Sequence[dict[str, Any]], *, note: str = "", quiet: bool = False
) -> Path:
    """Write ``<date>_<name>.md`` and ``.json`` into ``folder``, print the table unless ``quiet``; return the first."""
    facts = machine()
    text = f"# {title}\n\n{note}\n\n{markdown_table(rows)}\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date']}_{name}.md"
    write_text(path, text + "\n")
    write_text(path.with_suffix(".json"), json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1))
    if not quiet:
        Console().print(Markdown(text))
    return path


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]] if spec else sys.argv
