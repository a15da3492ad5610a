"""Run the same small step hundreds of times without paying for its kernel launches each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.calibration.blocks import map_tensors, tensors_in

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
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._record = device.type == "cuda"
        self._warm = False
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
        try:
            try:
                graph = self._captured()
            except torch.OutOfMemoryError:  # what the cache holds elsewhere cannot serve a recording
                torch.cuda.empty_cache()
                graph = self._captured()
        except RuntimeError as error:
            _tell(str(error).splitlines()[0] if str(error) else type(error).__name__)
            self._record = False
            return None
        _last[self._device] = graph
        return graph

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Not by ``torch.cuda.graph``, which waits for the device and empties torch's cache."""
        graph = torch.cuda.CUDAGraph()
        pool = _last[self._device].pool() if self._device in _last else torch.cuda.graph_pool_handle()
        with torch.cuda.stream(_side_stream(self._device)):
            try:
                # "thread_local": a data loader's pinning thread that touches CUDA does not spoil the recording.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                self._step()
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):  # it has ended, or ends here
                    graph.capture_end()
                _end_capture(self._device, pool)
                _last.pop(self._device, None)  # nothing can be recorded any more into the memory of a failed one
                raise
        return graph


class ReplayedOn:
    """Calls ``step`` on arguments that differ from call to call; a CUDA device records it once for all of one form.

    The arguments are copied to where the recording finds them. Whatever in them is no tensor is part of the form, as
    are shape, strides and dtype of each tensor.

    Args:
        step: works in place on tensors that stay where they are; takes tensors and other values, nested in tuples,
            lists and dictionaries, which it leaves as they are; returns nothing.
        device: as for :class:`Replayed`.
    """

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._recordings: list[tuple[Any, list[Tensor], Replayed]] = []

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> None:
        if self._device.type != "cuda":
            self._step(*arguments)
            return
        form, given = map_tensors(_form, arguments), tensors_in(arguments)
        found = next(((places, run) for known, places, run in self._recordings if known == form), None)
        if found is None:
            own = map_tensors(lambda one: one.detach().clone().requires_grad_(one.requires_grad), arguments)
            found = tensors_in(own), Replayed(partial(self._step, *own), self._device)
            self._recordings.append((form, *found))
        places, run = found
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        run()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Recording happens beside the default stream, which cannot be recorded, and on one stream each time: libraries
    keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)


@cache
def _tell(reason: str) -> None:
    """Once for each reason: the solver has hundreds of steps to record."""
    log.warning("some steps are slower than they could be, for they cannot be recorded as a CUDA graph: %s", reason)


def _end_capture(device: torch.device, pool: Any) -> None:
    """Tell the allocator that a capture which has failed is over: torch does not, and no memory would be given back to
    the device any more. There is no public way."""
    with suppress(RuntimeError):  # it knows already
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


def release_recordings() -> None:
    """Leave the memory that recordings have shared to others. They come again at the price of new memory."""
    _last.clear()
