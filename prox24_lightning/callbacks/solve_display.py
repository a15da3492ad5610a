"""Pauses for solving in Lightning's own progress bar, or as lines of the log where there is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from prox24_lightning.sparsify.solve_watch import LogLines, SolveDisplay, SolveState


class _RichBar:
    """A task of its own in the display of a RichProgressBar. It is hidden, not removed: ids are places in a list."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._progress: Any = None
        self._task: Any = None

    def show(self, state: SolveState) -> None:
        progress = self._bar.progress
        if progress is not self._progress:  # the bar makes another one for each stage
            self._progress, self._task = progress, progress.add_task("", total=state.blocks)
        progress.update(
            self._task,
            completed=max(0, state.block - 1),
            total=state.blocks,
            description=f"Solving {state}",
            visible=True,
        )
        progress.refresh()

    def end(self, state: SolveState, *, stopped: bool) -> None:
        if self._progress is not None:
            self._progress.update(self._task, visible=False)
            self._progress.refresh()


class _TqdmBar:
    """A bar below that of a TQDMProgressBar, where it shows the validation."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._line: Any = None

    def show(self, state: SolveState) -> None:
        if self._line is None:
            self._line = type(self._bar.train_progress_bar)(
                total=state.blocks,
                position=2 * self._bar.process_position + 1,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]",
            )
        self._line.n = max(0, state.block - 1)
        self._line.set_description_str(f"Solving {state}")

    def end(self, state: SolveState, *, stopped: bool) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None


class TrainerDisplay:
    """Shows pauses in the progress bar of a trainer, or as lines of its log. Only the first rank shows anything.

    Args:
        name: of the Prox24.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer = trainer
        self._lines = LogLines(rank_zero_info, name)
        self._shown: SolveDisplay | None = None

    def show(self, state: SolveState) -> None:
        if not self._trainer.is_global_zero:
            return
        if self._shown is None:
            self._shown = _bar_of(self._trainer) or self._lines
        self._shown.show(state)

    def end(self, state: SolveState, *, stopped: bool) -> None:
        if self._shown is not None:
            self._shown.end(state, stopped=stopped)


def stop_on_sigterm(trainer: Trainer) -> None:
    """Raise what Lightning raises at the end of a batch, if the process has received SIGTERM."""
    if trainer.received_sigterm:
        raise SIGTERMException


def how_to_go_on(trainer: Trainer) -> str:
    """Return in words how an interrupted fit is resumed: from the newest checkpoint."""
    saved: list[tuple[int, str]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if path := getattr(callback, "_last_checkpoint_saved", ""):
            saved.append((callback._last_global_step_saved, path))
        elif type(callback).__name__ == "OnExceptionCheckpoint":
            saved.append((trainer.global_step, str(callback.ckpt_path)))
    if saved:
        return f"go on with trainer.fit(..., ckpt_path={max(saved)[1]!r})"
    return (
        "there is no checkpoint to go on from: ModelCheckpoint(every_n_train_steps=...) writes them during the run, "
        "OnExceptionCheckpoint one when it is stopped"
    )


def _bar_of(trainer: Trainer) -> SolveDisplay | None:
    """Return a display in the trainer's progress bar; None where there is none, or no terminal for it."""
    bar: Any = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", False):
        return None
    kinds = {cls.__name__ for cls in type(bar).__mro__}
    if "RichProgressBar" in kinds:
        return _RichBar(bar) if bar.progress is not None and bar.progress.console.is_terminal else None
    return _TqdmBar(bar) if "TQDMProgressBar" in kinds and sys.stdout.isatty() else None
