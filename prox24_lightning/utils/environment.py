"""Where and with what a result was produced: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "datasets", "triton", "numpy")


def describe_environment() -> dict[str, str]:
    """Return date, commit, machine, GPU, system and versions; packages that are not installed are left out."""
    facts = {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "gpu": "none",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts | _versions()


def _versions() -> dict[str, str]:
    from prox24_lightning import __version__

    found = {"prox24_lightning": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the commit of the code; PROX24_COMMIT names it where the code lies without its repository."""
    if named := os.environ.get("PROX24_COMMIT"):
        return named

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (", with local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
