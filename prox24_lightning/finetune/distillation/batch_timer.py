"""Measure which share of a batch's time one part of it takes, on sampled batches, without waiting for the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

Mark = torch.cuda.Event | float


@dataclass(frozen=True)
class TimeShare:
    """Medians over ``samples`` batches: milliseconds of the part and of the whole batch, and their ratio in [0, 1]."""

    part_ms: float
    whole_ms: float
    ratio: float
    samples: int


class BatchTimer:
    """Time every ``every``-th batch after the first ``warm_up``, and one part of it.

    On a CUDA GPU the times are CUDA events, which only :meth:`result` reads: no batch waits for the GPU.

    Args:
        device: where the work runs.
        every, warm_up: in batches.
        most: how many of the latest samples are kept.
    """

    def __init__(self, device: torch.device, *, every: int = 16, warm_up: int = 2, most: int = 64) -> None:
        self._device = device
        self._every, self._warm_up, self._most = every, warm_up, most
        self._batches = 0
        self._marks: list[Mark] | None = None
        self._samples: list[list[Mark]] = []

    def begin(self) -> None:
        """Start a batch."""
        since = self._batches - self._warm_up
        self._batches += 1
        self._marks = [self._mark()] if since >= 0 and since % self._every == 0 else None

    @contextmanager
    def part(self) -> Iterator[None]:
        """Time the block of code as the part; several parts of one batch add up."""
        if self._marks is None:
            yield
            return
        self._marks.append(self._mark())
        yield
        self._marks.append(self._mark())

    def end(self) -> None:
        """Finish the batch. It is a sample if its part has run."""
        if self._marks is not None and len(self._marks) > 1:
            self._samples = [*self._samples[1 - self._most :], [*self._marks, self._mark()]]
        self._marks = None

    def result(self) -> TimeShare | None:
        """Return the medians, or None without a sample. Waits for the GPU, once."""
        if not self._samples:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        parts, wholes = [], []
        for first, *inner, last in self._samples:
            parts.append(sum(_milliseconds(a, b) for a, b in zip(inner[::2], inner[1::2], strict=True)))
            wholes.append(_milliseconds(first, last))
        ratio = median(part / whole if whole else 0.0 for part, whole in zip(parts, wholes, strict=True))
        return TimeShare(median(parts), median(wholes), ratio, len(parts))

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _milliseconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        return 1000 * (end - start)  # type: ignore[operator]
    return start.elapsed_time(end)  # type: ignore[arg-type]
