"""Measure calls on a CUDA GPU: their time, launched one by one or from a CUDA graph, and the error of their outputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

from prox24_lightning.utils.tensors import tensors_in

Call = Callable[[], object]

WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over the rounds, and the lower and upper quartile."""

    median_us: float
    low_us: float
    high_us: float


def time_calls(
    variants: Mapping[str, Call],
    *,
    calls: int = 1,
    rounds: int = 20,
    prepare: Callable[[str], None] = lambda variant: None,
) -> dict[str, Timing]:
    """Time each variant with CUDA events, in turn within every round, so that a drifting machine hits all alike.

    Every second round runs in reverse order: a steady drift within a round then cancels out.

    The queue is empty when a variant starts, so the time of a variant that the host cannot launch fast enough
    includes that host time.

    Args:
        variants: name -> callable that does the work ``calls`` times on the current stream.
        calls: the times are divided by this.
        rounds: at least 2.
        prepare: called with a variant's name before each of its calls, outside of their time.
    """
    for name, call in variants.items():
        prepare(name)
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants.items())
    for number in range(rounds):
        for name, call in order if number % 2 == 0 else reversed(order):
            prepare(name)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: _summary(values) for name, values in times.items()}


def host_seconds(calls: Mapping[str, Call], rounds: int, *, warm_ups: int = 2) -> dict[str, float]:
    """Return the median seconds of each call as its caller sees them, all in turn within every round.

    Args:
        calls: name -> the call; a GPU's work has ended when its time is taken.
        rounds: calls of each that count.
        warm_ups: calls of each before them, which compile and capture.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + warm_ups):
        for name, call in calls.items():
            _wait()
            start = perf_counter()
            call()
            _wait()
            if number >= warm_ups:
                seconds[name].append(perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(values: list[float]) -> Timing:
    low, _, high = quantiles(values, n=4)
    return Timing(median(values), low, high)


def relative_error(reference: Tensor | Sequence[Tensor], outputs: Tensor | Sequence[Tensor]) -> float:
    """Return ``||outputs - reference|| / ||reference||`` over all tensors in float32; inf if only that is 0."""
    pairs = zip(tensors_in(reference), tensors_in(outputs), strict=True)
    parts = [((b.float() - a.float()).square().sum(), a.float().square().sum()) for a, b in pairs]
    difference = sum(float(part) for part, _ in parts) ** 0.5
    norm = sum(float(part) for _, part in parts) ** 0.5
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def release_memory() -> None:
    """Return the GPU memory of deleted tensors to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
