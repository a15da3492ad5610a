"""A progress bar over layers, with the time left."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class LayerProgress:
    """``with LayerProgress(layers) as bar: bar.step(1, name)``; shows nothing when it is not ``enabled``."""

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
        """So many more layers are done, the last of them ``name``."""
        self._bar.update(self._task, advance=layers, description=name)

    def describe(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def shrink(self, layers: int) -> None:
        """So many layers need not be done after all."""
        self.total -= layers
        self._bar.update(self._task, total=self.total)
