"""CUDA graphs of small steps that run hundreds of times: their kernels are launched by one call."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.utils.tensors import map_tensors, tensors_in

log = logging.getLogger(__name__)


class GraphMemory:
    """Memory that the graphs captured within :meth:`shared` use one after the other.

    Torch gives each graph memory of its own, which serves nothing else until the device is full. So a graph takes the
    memory of the one before it, which is kept for that: what it left there is gone once another graph has run.
    """

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.cuda.CUDAGraph] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Graphs that are captured in this context share the memory."""
        token = _memory.set(self)
        try:
            yield
        finally:
            _memory.reset(token)

    def release(self) -> None:
        """Give the memory back; graphs captured later take new memory."""
        self._last.clear()

    def pool(self, device: torch.device) -> Any:
        """Return the pool of the last graph captured on ``device``, or a new one."""
        return self._last[device].pool() if device in self._last else torch.cuda.graph_pool_handle()

    def keep(self, device: torch.device, graph: torch.cuda.CUDAGraph | None) -> None:
        """Let the next graph take the memory of ``graph``; None after a failed capture, whose memory is lost."""
        if graph is None:
            self._last.pop(device, None)
        else:
            self._last[device] = graph


_memory: ContextVar[GraphMemory | None] = ContextVar("graph_memory", default=None)


class GraphedStep:
    """Call ``step``; on a CUDA device the second call captures a graph, which all later calls replay.

    The first call runs eagerly, so that kernels are compiled and workspaces exist before the capture. A step that
    cannot be captured, because it waits for the device, runs eagerly every time.

    Args:
        step: works in place on tensors that stay where they are, takes and returns nothing.
        device: where these tensors are.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._capturable = device.type == "cuda"
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._capturable and self._warm and self._graph is None:
            self._graph = self._captured()
        if self._graph is None:
            self._step()
            self._warm = True
        else:
            self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        memory = _memory.get() or GraphMemory()
        try:
            try:
                graph = self._capture(memory)
            except torch.OutOfMemoryError:  # what torch has cached elsewhere cannot serve a capture
                torch.cuda.empty_cache()
                graph = self._capture(memory)
        except RuntimeError as error:
            _log_once(str(error).splitlines()[0] if str(error) else type(error).__name__)
            self._capturable = False
            return None
        memory.keep(self._device, graph)
        return graph

    def _capture(self, memory: GraphMemory) -> torch.cuda.CUDAGraph:
        try:
            return _record(self._step, self._device, memory.pool(self._device))
        except BaseException:
            memory.keep(self._device, None)
            raise


class GraphedFunction:
    """Call ``step`` on arguments that differ from call to call; a CUDA device captures one graph for each form.

    The arguments are copied to where the graph finds them. Whatever in them is no tensor is part of the form, as
    are shape, strides and dtype of each tensor.

    Args:
        step: works in place on tensors that stay where they are; takes tensors and other values, nested in tuples,
            lists and dictionaries, which it leaves as they are; returns nothing.
        device: as for :class:`GraphedStep`.
    """

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._graphs: list[tuple[Any, list[Tensor], GraphedStep]] = []

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> None:
        if self._device.type != "cuda":
            self._step(*arguments)
            return
        form, given = map_tensors(_form, arguments), tensors_in(arguments)
        found = next(((places, run) for known, places, run in self._graphs if known == form), None)
        if found is None:
            own = map_tensors(lambda one: one.detach().clone().requires_grad_(one.requires_grad), arguments)
            found = tensors_in(own), GraphedStep(partial(self._step, *own), self._device)
            self._graphs.append((form, *found))
        places, run = found
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        run()


def capture(step: Callable[[], object], *, warm_ups: int = 3) -> torch.cuda.CUDAGraph:
    """Return ``step`` as a CUDA graph of the current device with memory of its own.

    Args:
        step: the work, on the current stream.
        warm_ups: eager calls before the capture, on the capture's stream, as torch asks.

    Raises:
        RuntimeError: if the step cannot be captured: it waits for the device, or allocates outside torch.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    current, side = torch.cuda.current_stream(), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    current.wait_stream(side)
    torch.cuda.synchronize()
    try:
        return _record(step, device, torch.cuda.graph_pool_handle())
    except torch.OutOfMemoryError:  # what torch has cached elsewhere cannot serve a capture
        torch.cuda.empty_cache()
        return _record(step, device, torch.cuda.graph_pool_handle())


def _record(step: Callable[[], object], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Return ``step`` as a graph.

    ``torch.cuda.graph`` would also wait for the device, empty torch's cache and collect garbage, which takes up to a
    second in a process that has imported much.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side_stream(device)), _no_garbage_collection():
        try:
            # "thread_local": a data loader's pinning thread that touches CUDA does not spoil the capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            step()
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it has ended, or ends here
                graph.capture_end()
            _end_capture(device, pool)
            raise
    return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A tensor that garbage collection frees during a capture could end it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: the default stream cannot be captured, and libraries keep a workspace for
    every stream they have seen."""
    return torch.cuda.Stream(device)


@cache
def _log_once(reason: str) -> None:
    """Say each reason once: the solver has hundreds of steps to capture."""
    log.info("some steps are slower than they could be: they cannot be captured as a CUDA graph (%s)", reason)


def _end_capture(device: torch.device, pool: Any) -> None:
    """Tell the allocator that a failed capture is over: torch does not, and no memory would be given back to
    the device any more. There is no public way."""
    with suppress(RuntimeError):  # it knows already
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
