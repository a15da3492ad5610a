"""Long computations say where they are between their small pieces, so that they can be watched and stopped there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watch = Callable[[str], None]
"""Called between two pieces with the name of what comes next, "" where that is still the same; may raise to stop."""

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def between_pieces(name: str = "") -> None:
    """Tell whoever watches that a small piece of the computation is done.

    Args:
        name: of what is computed from here on; "" if that is the same as before.
    """
    watch = _watch.get()
    if watch is not None:
        watch(name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Call ``watch`` between the pieces of what is computed inside of the context."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
