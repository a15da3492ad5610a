"""Run the same small step hundreds of times without paying for its kernel launches each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


class Replayed:
    """Calls ``step``; on a CUDA device the second call records a graph, which all calls from then on replay.

    The first call runs as written, so that kernels are compiled and workspaces exist before the recording. A step that
    cannot be recorded, because it waits for the device, runs as written every time.

    Args:
        step: works in place on tensors that stay where they are, takes and returns nothing.
        device: where these tensors are.
        pool: memory to share with graphs of steps that take turns with this one (``torch.cuda.graph_pool_handle()``).
        warm: another step has run the same kernels on the same shapes: record at the first call.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        *,
        pool: Any = None,
        warm: bool = False,
    ) -> None:
        self._step = step
        self._record = device.type == "cuda"
        self._pool = pool
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
        try:
            # "thread_local": a data loader's pinning thread that touches CUDA meanwhile does not spoil the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch leaves its capture stream current when a capture fails
            log.info("a step runs as written, for it cannot be recorded: %s", error)
            self._record = False
            return None
        return graph
