"""Run the same small step hundreds of times without paying for its kernel launches each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

log = logging.getLogger(__name__)

_last: dict[torch.device, torch.cuda.CUDAGraph] = {}
"""The latest recording on each device. Torch gives a recording memory of its own, which serves nothing else until the
device is full: so the next one takes the memory of the last, which must still be there for that."""


class Replayed:
    """Calls ``step``; on a CUDA device the second call records a graph, which all calls from then on replay.

    The first call runs as written, so that kernels are compiled and workspaces exist before the recording. A step that
    cannot be recorded, because it waits for the device, runs as written every time.

    Args:
        step: works in place on tensors that stay where they are, takes and returns nothing.
        device: where these tensors are. Recordings there share their memory, so what one of them makes is no longer
            there once another has run; :func:`release_recordings` gives it back.
        warm: another step has run the same kernels on the same shapes: record at the first call.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, warm: bool = False) -> None:
        self._step = step
        self._device = device
        self._record = device.type == "cuda"
        self._warm = warm
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._record and self._warm and self._graph is None:
            self._graph = self._recorded()
        if self._graph is None:
            self._step()
            self._warm = True
        else:
            self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = _last[self._device].pool() if self._device in _last else torch.cuda.graph_pool_handle()
        try:
            # "thread_local": a data loader's pinning thread that touches CUDA meanwhile does not spoil the recording.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch leaves its capture stream current when a capture fails
            _end_capture(self._device, pool)
            _tell(str(error).splitlines()[0] if str(error) else type(error).__name__)
            self._record = False
            return None
        _last[self._device] = graph
        return graph


@cache
def _tell(reason: str) -> None:
    """Once for each reason: the solver has hundreds of steps to record."""
    log.warning("some steps are slower than they could be, for they cannot be recorded as a CUDA graph: %s", reason)


def _end_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Tell the allocator that a capture which has failed is over: torch does not, and no memory would be given back to
    the device any more. There is no public way."""
    with suppress(RuntimeError):  # it knows already
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def release_recordings() -> None:
    """Leave the memory that recordings have shared to others. They come again at the price of new memory."""
    _last.clear()
