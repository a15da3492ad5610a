"""Exit codes of the commands: errors are one line where a user can mend them, and code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

ERROR = 2


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
