"""Measured times on disk, so that a shape is measured once on a machine.

One JSON file under the user's cache folder. An entry's key names everything the times depend on: GPU, driver, torch,
cuSPARSELt, the package's kernels, dtype, shape, number of tokens. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from prox24_lightning.convert import kernels
from prox24_lightning.convert.autotune.kernel_table import KernelTimes
from prox24_lightning.convert.kernels.cuda_driver import driver_version
from prox24_lightning.utils.files import write_text

VERSION = 1
"""Of the file's form."""

PATH_VARIABLE = "PROX24_KERNEL_CACHE"
"""Names another file than the default one."""


@dataclass(frozen=True)
class Machine:
    """The GPU and the software that times belong to."""

    gpu: str
    driver: str
    torch: str
    cusparselt: str
    kernels: str

    @classmethod
    def here(cls, device: int) -> Machine:
        return cls(
            torch.cuda.get_device_name(device),
            driver_version(),
            str(torch.__version__),
            str(torch.backends.cusparselt.version()),
            _kernels_digest(),
        )


def default_path() -> Path:
    """``$PROX24_KERNEL_CACHE``, or ``prox24_lightning/kernels.json`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get(PATH_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prox24_lightning" / "kernels.json"


def key(machine: Machine, dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> str:
    """All of it as text, readable in the file."""
    facts = [*asdict(machine).values(), str(dtype).removeprefix("torch."), "x".join(map(str, shape)), str(tokens)]
    return " | ".join(facts)


def read(path: Path) -> dict[str, KernelTimes]:
    """Every entry of the file; none if it is missing, damaged, or of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        return {name: _times(entry) for name, entry in data["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def add(path: Path, entries: dict[str, KernelTimes]) -> None:
    """Add to what the file holds by now; a reader never sees half of it.

    Two processes that write at the same moment lose the entries of one, which are measured again.

    Raises:
        OSError: if the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {name: asdict(entry) for name, entry in sorted((read(path) | entries).items())}
    write_text(path, json.dumps({"version": VERSION, "entries": merged}, indent=1) + "\n")


def find(
    path: Path,
    machine: Machine,
    dtype: torch.dtype,
    shape: tuple[int, int],
    token_counts: Sequence[int] | None = None,
) -> dict[int, KernelTimes]:
    """The entries there are, ascending in tokens; one without a kernel (the memory was full) counts for none.

    Args:
        token_counts: those of interest; None takes whatever has been measured.
    """
    entries = {name: entry for name, entry in read(path).items() if entry.kernels}
    if token_counts is None:
        token_counts = sorted({entry.tokens for entry in entries.values()})
    names = {tokens: key(machine, dtype, shape, tokens) for tokens in token_counts}
    return {tokens: entries[name] for tokens, name in names.items() if name in entries}


@cache
def _kernels_digest() -> str:
    """Return a digest of the package's CUDA kernels: times of other kernels are of no use."""
    folder = Path(kernels.__path__[0])
    sources = sorted([*folder.glob("*/*.cu"), *folder.glob("warpgroup/*.py")])
    return sha256("".join(source.read_text(encoding="utf-8") for source in sources).encode()).hexdigest()[:12]


def _times(entry: dict[str, Any]) -> KernelTimes:
    kernels = {str(name): float(us) for name, us in entry["kernels"].items()}
    return KernelTimes(int(entry["tokens"]), float(entry["dense_us"]), kernels, tuple(map(str, entry["notes"])))
