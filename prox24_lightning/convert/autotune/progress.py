"""A bar while kernels are searched, which takes minutes where a machine meets shapes for the first time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typing_extensions import override


class SearchProgress(Progress):
    """``with SearchProgress() as bar: advance = bar.begin("timing", 12); advance()``; on a terminal only, and not while
    something else (a trainer's bar) is being drawn there."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    @override
    def start(self) -> None:
        with suppress(LiveError):
            super().start()

    def begin(self, what: str, steps: int) -> Callable[[], None]:
        """A line of its own for ``what``; the result is to be called after each of its steps."""
        return partial(self.advance, self.add_task(what, total=steps))
