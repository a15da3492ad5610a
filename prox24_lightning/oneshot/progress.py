"""A progress bar over layers, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class LayerProgress:
    """Show the number of finished layers and the time left; nothing when not ``enabled``."""

    def __init__(self, layers: int, *, enabled: bool = True) -> None:
        self.total = layers
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=not enabled,
        )
        self._task = self._bar.add_task("pruning", total=layers)

    def __enter__(self) -> LayerProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, layers: int, name: str) -> None:
        """Count ``layers`` more as finished, the last of them ``name``."""
        self._bar.update(self._task, advance=layers, description=name)

    def describe(self, text: str) -> None:
        """Show ``text`` beside the bar."""
        self._bar.update(self._task, description=text)

    @contextmanager
    def measured(self, most: int) -> Iterator[Callable[[str], None]]:
        """Show a second bar of ``most`` steps; yield a function that advances it and shows the text it is given."""
        task = self._bar.add_task("measuring", total=most)
        try:
            yield lambda text: self._bar.update(task, advance=1, description=text)
        finally:
            self._bar.remove_task(task)

    def shrink(self, layers: int) -> None:
        """Take ``layers`` off the total."""
        self.total -= layers
        self._bar.update(self._task, total=self.total)
