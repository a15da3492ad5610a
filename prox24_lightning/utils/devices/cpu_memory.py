"""How much memory of the CPU is left."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory() -> float:
    """Return the bytes that programs can still take, of the machine or of the container (control groups, version 2);
    infinity where the system, as others than Linux, does not say."""
    found = [math.inf]
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(1024 * float(line.split()[1]))
    with suppress(OSError, ValueError):  # "max": no limit
        limit = float((_CONTAINER / "memory.max").read_text())
        found.append(limit - float((_CONTAINER / "memory.current").read_text()))
    return min(found)
