"""Exit codes of the commands: errors are one line where a user can mend them, and code 2."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ERROR = 2
TERMINATED = 143
"""Exit code after SIGTERM, as of a shell: 128 and the number of the signal."""


@contextmanager
def errors_as_exit(command: str) -> Iterator[None]:
    """Turn an exception into a message on stderr and exit code 2.

    Python's own code for an exception is 1, which means "nothing found" here. Errors that a user cannot cause are
    printed with their traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, TypeError) as error:
        print(f"prox24 {command}: {error}", file=sys.stderr)
        raise SystemExit(ERROR) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(ERROR) from error


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM (a time limit, a scheduler) end what runs inside as Ctrl-C does, so that results can be kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread alone
        return

    def end(*_: Any) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
