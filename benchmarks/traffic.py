"""Count what the package sends between ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor


class Traffic:
    """Bytes that a rank has handed to collective operations called from Python; DDP's and FSDP2's own are in C++.

    Attributes:
        bytes: of tensors, and of pickled objects.
        calls: how many operations.
    """

    def __init__(self) -> None:
        self.bytes = self.calls = 0

    def _add(self, size: int) -> None:
        self.bytes += size
        self.calls += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is called as ``torch.distributed.NAME`` in this context."""
        tensors = {"all_reduce": 0, "broadcast": 0, "all_gather": 1}
        objects = {"all_gather_object": 1, "broadcast_object_list": 0, "gather_object": 0}
        patches = [patch.object(dist, name, self._counting(name, place, _size)) for name, place in tensors.items()]
        patches += [patch.object(dist, name, self._counting(name, place, _pickled)) for name, place in objects.items()]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    def _counting(self, name: str, place: int, size: Callable[[Any], int]) -> Callable[..., Any]:
        operation = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self._add(size(args[place]))
            return operation(*args, **kwargs)

        return counting


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pickled(value: Any) -> int:
    return len(pickle.dumps(value))
