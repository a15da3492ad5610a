"""Keep measured times on disk, so that a shape is measured once on a machine.

One JSON file in the user's cache folder. An entry's key names everything that the times depend on: GPU, driver, torch,
cuSPARSELt, the package's kernels, dtype, shape, number of tokens. Whatever is in the file, a conversion goes on: a file
that cannot be read counts as empty, and an entry that no measurement can have made counts as not measured.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prox24_lightning.convert import kernels
from prox24_lightning.convert.autotune.kernel_table import KernelTimes
from prox24_lightning.convert.kernels.cuda_driver import driver_version
from prox24_lightning.convert.kernels.registry import OLDEST_FP8_CAPABILITY, dense_fp8_kernels, is_packed_kernel
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.file_lock import locked
from prox24_lightning.utils.files import write_text
from prox24_lightning.weights.rounding import RoundedForm

VERSION = 1
"""Version of the file's structure."""

PATH_VARIABLE = "PROX24_KERNEL_CACHE"
"""Environment variable that names another file than the default one."""

_MOST_BYTES = 2**26  # some 100,000 entries
_MOST_TOKENS = 2**31
_SHORTEST_US, _LONGEST_US = 0.1, 1e8  # no launch is shorter, no product longer
_LARGEST_GAIN = 50.0  # over cuBLAS; sparse tensor cores double the speed, and cuBLAS is never this far from its best
_DAMAGED = "its times in the kernel cache are damaged"
_LOCK_SECONDS = 10.0  # to wait for another process that writes

log = logging.getLogger(__name__)


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
    """Return ``$PROX24_KERNEL_CACHE``, or ``prox24_lightning/kernels.json`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Where the user has no home, as in some containers, the folder is one for temporary files.
    """
    if named := os.environ.get(PATH_VARIABLE):
        return Path(named)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no $HOME, and no entry in the system's list of users
        folder = Path(tempfile.gettempdir())
    return folder / "prox24_lightning" / "kernels.json"


def key(
    machine: Machine, dtype: torch.dtype, shape: tuple[int, int], tokens: int, form: RoundedForm | None = None
) -> str:
    """Return the key of an entry, readable in the file; ``form`` is that of a weight of 8 bits."""
    name = str(dtype).removeprefix("torch.")
    kind = name if form is None else f"{form} in {name}"
    return " | ".join([*asdict(machine).values(), kind, "x".join(map(str, shape)), str(tokens)])


def read(path: Path) -> dict[str, KernelTimes]:
    """Return every entry of the file; none, with one warning, if it is damaged or cannot be read.

    Entries that no measurement can have given are left out, or have no ``kernels`` where only these are wrong.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than {_MOST_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("version") != VERSION:  # of another release
            return {}
        if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
            raise ValueError("it holds no entries")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        _warn_once(path, describe(error))
        return {}
    entries = {name: _read_entry(entry) for name, entry in data["entries"].items()}
    damaged = [name for name, entry in entries.items() if entry is None or entry.notes == (_DAMAGED,)]
    if damaged:
        _warn_once(path, f"{len(damaged)} of {len(entries)} entries are damaged, first {damaged[0]!r:.200}")
    return {name: entry for name, entry in entries.items() if entry is not None}


def add(path: Path, entries: dict[str, KernelTimes]) -> None:
    """Add entries to those that the file holds by now; a reader never sees half of it.

    Processes that write at the same time take turns, so that the file holds the entries of all.

    Raises:
        OSError: if the folder cannot be written, or the path is no regular file.
    """
    if path.exists() and not path.is_file():  # a folder, or a device that must not be replaced
        raise OSError(f"{path} is no regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _wait_for_lock(stack, path.with_name(f"{path.name}.lock"))
        kept = {name: entry for name, entry in read(path).items() if entry.kernels}
        merged = {name: asdict(entry) for name, entry in sorted((kept | entries).items())}
        write_text(path, json.dumps({"version": VERSION, "entries": merged}, indent=1) + "\n")


def find(
    path: Path,
    machine: Machine,
    dtype: torch.dtype,
    shape: tuple[int, int],
    token_counts: Sequence[int] | None = None,
    *,
    form: RoundedForm | None = None,
) -> dict[int, KernelTimes]:
    """Return the measured entries of a shape, ascending in tokens; those without a kernel are left out.

    Args:
        path: the file.
        machine: the GPU and the software.
        dtype: of inputs and outputs.
        shape: (out_features, in_features).
        token_counts: those of interest; None takes whatever has been measured.
        form: of a weight of 8 bits; None for one in ``dtype``.
    """
    entries = {name: entry for name, entry in read(path).items() if entry.kernels}
    if token_counts is None:
        token_counts = sorted({entry.tokens for entry in entries.values()})
    names = {tokens: key(machine, dtype, shape, tokens, form) for tokens in token_counts}
    return {
        tokens: entries[name]
        for tokens, name in names.items()
        if name in entries and entries[name].tokens == tokens  # moved to another key, it would be another product's
    }


def _read_entry(entry: Any) -> KernelTimes | None:
    """Return an entry, without its kernels if one of them is wrong; None if anything else is."""
    if not isinstance(entry, dict):
        return None
    values: list[Any] = [entry.get(name) for name in ("tokens", "dense_us", "kernels", "notes")]
    tokens, dense_us, times, notes = values
    dense_fp8_us = entry.get("dense_fp8_us")
    if not (type(tokens) is int and 1 <= tokens <= _MOST_TOKENS and _is_time(dense_us)):
        return None
    if dense_fp8_us is not None and not _is_time(dense_fp8_us):
        return None
    if not (isinstance(times, dict) and isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
        return None
    shortest = dense_us / _LARGEST_GAIN
    if not all(is_packed_kernel(name) and _is_time(us) and us >= shortest for name, us in times.items()):
        return KernelTimes(tokens, float(dense_us), {}, (_DAMAGED,))
    found = {name: float(us) for name, us in times.items()}
    fp8_us = None if dense_fp8_us is None else float(dense_fp8_us)
    way = entry.get("dense_fp8_kernel", "")
    return KernelTimes(tokens, float(dense_us), found, tuple(notes), fp8_us, way if way in _DENSE_FP8 else "")


_DENSE_FP8 = [str(kernel) for kernel in dense_fp8_kernels(OLDEST_FP8_CAPABILITY)]


def _is_time(value: Any) -> bool:
    """Return whether a value is a possible time in microseconds; NaN is not."""
    return type(value) in (int, float) and _SHORTEST_US <= value <= _LONGEST_US


def _wait_for_lock(stack: ExitStack, path: Path) -> None:
    """Hold the lock until ``stack`` ends; go on without it where there are no locks, or another process hangs."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            stack.enter_context(locked(path))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        except OSError:
            return


@cache
def _warn_once(path: Path, problem: str) -> None:
    """Warn of a problem once a process: the file is read for each layer."""
    log.warning("damaged kernel cache %s: %s; these kernels are measured again, or chosen by rule", path, problem)


@cache
def _kernels_digest() -> str:
    """Return a digest of the package's CUDA kernels: times of other kernels are of no use."""
    folder = Path(kernels.__path__[0])
    sources = sorted([*folder.glob("*/*.cu"), *folder.glob("warpgroup/*.py"), *folder.glob("many_tokens/*.py")])
    return checksum(source.read_text(encoding="utf-8") for source in sources)[:12]
