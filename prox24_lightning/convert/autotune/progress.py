"""Show progress while kernels are tuned, which takes minutes for shapes that are new on a machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typing_extensions import override


class TuningProgress(Progress):
    """``with TuningProgress() as progress: advance = progress.begin("timing", 12); advance()``.

    It draws on a terminal only, and not while something else (a trainer's bar) draws there.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    @override
    def start(self) -> None:
        with suppress(LiveError):
            super().start()

    def begin(self, what: str, steps: int) -> Callable[[], None]:
        """Add a bar for ``what`` and return what to call after each of its steps."""
        return partial(self.advance, self.add_task(what, total=steps))
