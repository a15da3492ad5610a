"""A clock for timing code without a GPU: work advances it, and the machine may slow down on the way."""

from __future__ import annotations

import torch


class PretendedClock:
    """Takes the place of CUDA events; :meth:`work` advances it by ``us`` microseconds of a machine at full speed.

    Args:
        monkeypatch: pytest's.
        slowing: by which fraction of its first speed the machine slows down a millisecond.
    """

    def __init__(self, monkeypatch, slowing: float = 0.0) -> None:
        self.now = 0.0
        self.slowing = slowing
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work(self, us: float) -> None:
        self.now += us * (1 + self.slowing * self.now / 1000)
