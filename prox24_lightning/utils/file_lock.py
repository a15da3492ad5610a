"""One owner of a folder at a time, among threads, processes, and machines that share a file system."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is made if it does not exist and names its owner.

    The system frees the lock when its process ends, however it ends, so that no stale one is left.

    Raises:
        BlockingIOError: if another thread or process holds it; the text names its machine, process and start.
        OSError: if the file cannot be made, or its file system has no locks.
    """
    if fcntl is None:
        raise OSError(f"{path}: this system has no file locks")
    with Path(path).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(_owner(Path(path))) from None
        try:
            file.truncate(0)
            started = datetime.now().astimezone().isoformat(timespec="seconds")
            json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": started}, file)
            file.flush()
            yield
        finally:
            # Also for children that were forked meanwhile and still have the file open.
            fcntl.flock(file, fcntl.LOCK_UN)


def _owner(path: Path) -> str:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return f"process {facts['process']} on {facts['host']}, since {facts['since']}"
    except (ValueError, KeyError, OSError):  # it has the lock, but has not written its name yet
        return "another process"
