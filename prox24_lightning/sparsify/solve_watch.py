"""What a user sees of a pause in which blocks are solved, and how he stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from prox24_lightning.utils.long_work import watched

_FIRST_SHOWN = 1.0
"""Seconds after which a pause is shown."""
_SHOWN_EVERY = 0.2
_ALIKE = 2.0
"""Blocks whose costs differ by at most this factor take times in proportion to them; others may not."""


@dataclass(frozen=True)
class SolveState:
    """Where a pause is.

    Attributes:
        block: number of the block that is solved, from 1; 0 before the first one.
        blocks: all blocks of the model.
        name: the layer that is solved.
        seconds: since the pause began.
        seconds_left: until it ends; None until blocks as large as those to come have been solved.
    """

    block: int
    blocks: int
    name: str
    seconds: float
    seconds_left: float | None = None

    @property
    def place(self) -> str:
        """What is being done, in words."""
        return f"block {self.block} of {self.blocks} ({self.name})" if self.block else self.name

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return f"{self.place}{left}"


class SolveDisplay(Protocol):
    """Shows pauses."""

    def show(self, state: SolveState) -> None:
        """Show where the present pause is; called some times a second, from its first second on."""

    def end(self, state: SolveState, *, stopped: bool) -> None:
        """The pause has ended; called if something has been shown, or an error or an interrupt has stopped it."""


class SolveWatch:
    """Follow the solving of blocks: show it, and stop it between small pieces of the work.

    Attributes:
        interrupted: where the last pause was when it was stopped; None if it was not.
    """

    def __init__(self) -> None:
        self.interrupted: SolveState | None = None
        self._display: SolveDisplay | None = None
        self._check: Callable[[], None] | None = None
        self._state = SolveState(0, 0, "", 0.0)
        self._begin = self._shown = self._block_begin = 0.0
        self._is_shown = False
        self._left: list[float] = []
        # Cost and seconds of all blocks solved so far, in this pause and before.
        self._solved: list[tuple[float, float]] = []

    def attach(self, display: SolveDisplay | None = None, check: Callable[[], None] | None = None) -> None:
        """From now on show pauses by ``display``, and call ``check`` between pieces: it raises to stop."""
        self._display, self._check, self.interrupted = display, check, None

    def detach(self) -> None:
        """Show nothing, and stop nothing."""
        self._display = self._check = None

    @contextmanager
    def pause(self, blocks: int, costs: Sequence[float]) -> Iterator[None]:
        """Watch a pause.

        Args:
            blocks: the number of all blocks of the model.
            costs: expected cost of each block that is solved in it, in any unit that is the same in every pause.
        """
        self.interrupted, self._is_shown = None, False
        self._begin = self._shown = self._block_begin = time.perf_counter()
        self._left = list(costs)
        self._state = SolveState(0, blocks, "", 0.0)
        try:
            with watched(self._between_pieces):
                yield
        except BaseException:
            self.interrupted = self._state
            raise
        finally:
            stopped = self.interrupted is not None
            if self._display is not None and (self._is_shown or stopped):
                self._display.end(self._now(), stopped=stopped)

    def block(self, number: int, name: str) -> None:
        """The block of this number is solved from here on."""
        self._block_begin = time.perf_counter()
        self._state = replace(self._state, block=number, name=name)
        self._between_pieces("")

    def solved(self) -> None:
        """The block has been solved."""
        self._solved.append((self._left.pop(0), time.perf_counter() - self._block_begin))

    def _between_pieces(self, name: str) -> None:
        if self._check is not None:
            self._check()
        if name:
            self._state = replace(self._state, name=name)
        now = time.perf_counter()
        if self._display is not None and now - self._begin >= _FIRST_SHOWN and now - self._shown >= _SHOWN_EVERY:
            self._shown, self._is_shown = now, True
            self._display.show(self._now())

    def _now(self) -> SolveState:
        now = time.perf_counter()
        expected = [self._expected(cost) for cost in self._left]
        left = None
        if expected and None not in expected:
            left = max(0.0, sum(seconds for seconds in expected if seconds) - (now - self._block_begin))
        return replace(self._state, seconds=now - self._begin, seconds_left=left)

    def _expected(self, cost: float) -> float | None:
        """Return the seconds that a block takes by those of its size that are solved; None where there is none."""
        alike = [
            (other, seconds) for other, seconds in self._solved if other <= _ALIKE * cost and cost <= _ALIKE * other
        ]
        work = sum(other for other, _ in alike)
        return cost * sum(seconds for _, seconds in alike) / work if work else None


class LogLines:
    """Shows pauses where there is no terminal: a line after some seconds, others at growing intervals, one at the end.

    Args:
        say: writes a line.
        name: what the lines begin with.
        first: seconds of a pause before its first line.
    """

    def __init__(self, say: Callable[[str], None], name: str, *, first: float = 5.0) -> None:
        self._say = say
        self._name = name
        self._first = first
        self._next = first

    def show(self, state: SolveState) -> None:
        if state.seconds >= self._next:
            self._next = max(2 * state.seconds, self._first) if state.seconds < 60 else state.seconds + 60
            self._say(f"{self._name}: solving {state}")

    def end(self, state: SolveState, *, stopped: bool) -> None:
        if state.seconds >= self._first and not stopped:
            done = f"solved up to block {state.block} of {state.blocks}" if state.block else "prepared"
            self._say(f"{self._name}: {done} in {state.seconds:.1f} s")
        self._next = self._first
