"""Run the same small step hundreds of times without paying for its kernel launches each time."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replayed:
    """Calls ``step``; on a CUDA device the second call records a graph, which all calls from then on replay.

    The first call runs as written, so that kernels are compiled and workspaces exist before the recording.

    Args:
        step: works in place on tensors that stay where they are, takes and returns nothing, and never waits for the
            device.
        device: where these tensors are.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._record = device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if not self._record or self._calls == 1:
            self._step()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        self._graph.replay()
