"""Measure calls on a CUDA GPU: their time, launched one by one or from a CUDA graph, and the error of their outputs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]

WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over the rounds, and the quartiles around it."""

    median_us: float
    low_us: float
    high_us: float


def time_calls(variants: Mapping[str, Call], *, calls: int = 1, rounds: int = 20) -> dict[str, Timing]:
    """Time each variant with CUDA events, in turn within every round, so that a drifting clock hits all alike.

    The queue is empty when a variant starts, so the time of a variant that the host cannot launch fast enough
    includes that host time.

    Args:
        variants: name -> callable that does the work ``calls`` times on the current stream.
        calls: the times are divided by this.
        rounds: at least 2.
    """
    for call in variants.values():
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / calls)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    low, _, high = quantiles(values, n=4)
    return Timing(median(values), low, high)


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """Record ``call`` as a CUDA graph, after warming it up on a side stream as torch asks.

    Raises:
        RuntimeError: if the work cannot be captured (it waits for the GPU, or allocates outside torch).
    """
    current = torch.cuda.current_stream()
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": a data loader's pinning thread that touches CUDA meanwhile does not spoil the capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            call()
    finally:
        torch.cuda.set_stream(current)  # torch leaves its capture stream current when a capture fails
    return graph


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # One for all captures: cuBLAS keeps a workspace of tens of MiB for every stream that it has ever seen.
    return torch.cuda.Stream(device)


def relative_error(reference: Tensor | Sequence[Tensor], outputs: Tensor | Sequence[Tensor]) -> float:
    """``||outputs - reference|| / ||reference||`` in float32 over all tensors; inf where only the reference is zero."""
    pairs = zip(tree_leaves(reference), tree_leaves(outputs), strict=True)
    parts = [((b.float() - a.float()).square().sum(), a.float().square().sum()) for a, b in pairs]
    difference = sum(float(part) for part, _ in parts) ** 0.5
    norm = sum(float(part) for _, part in parts) ** 0.5
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def release_memory() -> None:
    """Give the GPU memory of dropped copies back to the run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
