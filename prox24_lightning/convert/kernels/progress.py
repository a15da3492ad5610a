"""A bar while kernels are searched, which takes minutes where a machine meets shapes for the first time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class SearchProgress:
    """``with SearchProgress() as bar: advance = bar.begin("timing", 12); advance()``; on a terminal only, and not while
    something else (a trainer's bar) is being drawn there."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> SearchProgress:
        with suppress(LiveError):
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, steps: int) -> Callable[[], None]:
        """A line of its own for ``what``; the result is to be called after each of its steps."""
        return partial(self._bar.advance, self._bar.add_task(what, total=steps))
