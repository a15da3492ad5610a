"""Result files of the benchmarks: a dated Markdown table and the same numbers as JSON, with machine and versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from prox24_lightning.files import write_text

PACKAGES = ("torch", "lightning", "transformers", "triton", "numpy")


def machine() -> dict[str, str]:
    """Where and with what the numbers were taken."""
    facts = {"date": date.today().isoformat(), "python": platform.python_version(), "processor": _processor()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["commit"] = _commit()
    facts["command"] = shlex.join(["python", *_arguments()])
    return facts


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; floats to four significant digits."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_report(folder: Path, name: str, title: str, rows: Sequence[dict[str, Any]], *, note: str = "") -> Path:
    """Write ``<date>_<name>.md`` and ``.json`` into ``folder``, print the table, and return the Markdown's path."""
    facts = machine()
    text = f"# {title}\n\n{note}\n\n{markdown_table(rows)}\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date']}_{name}.md"
    write_text(path, text + "\n")
    write_text(path.with_suffix(".json"), json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1))
    Console().print(Markdown(text))
    return path


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of the code; PROX24_COMMIT names it where the code lies without its repository."""
    if named := os.environ.get("PROX24_COMMIT"):
        return named
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def _arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]] if spec else sys.argv
