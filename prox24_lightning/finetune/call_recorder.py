"""Record the calls of one module, with what its inner blocks gave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class RecordedCall:
    """One call of the module: its arguments, what it returned, and the outputs of the watched blocks by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    blocks: dict[str, Any]


class CallRecorder:
    """Watches ``module``, and ``blocks`` inside of it, while :meth:`recording`.

    A forward hook sees the calls of a compiled module, ``torch.compile(module)`` or ``module.compile()``, from outside
    of its graph, which need not be built again. Inside of a larger compiled graph (a compiled LightningModule) it
    is traced with the rest, if it was there when the graph was built.
    """

    def __init__(self, module: nn.Module, blocks: Mapping[str, nn.Module] | None = None) -> None:
        self._calls: list[RecordedCall] | None = None
        self._outputs: dict[str, Any] = {}
        self._handles = [module.register_forward_hook(self._called, with_kwargs=True)]
        for name, block in (blocks or {}).items():
            watch = block.register_forward_hook(lambda _module, _args, output, name=name: self._gave(name, output))
            self._handles.append(watch)

    def close(self) -> None:
        """Stop watching."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def recording(self) -> Iterator[list[RecordedCall]]:
        """The list of calls made within the context, in order."""
        calls: list[RecordedCall] = []
        self._calls = calls
        try:
            yield calls
        finally:
            # A block that is computed again in the backward pass (activation checkpointing) is not recorded twice.
            self._calls = None
            self._outputs = {}

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is not None:
            self._calls.append(RecordedCall(args, kwargs, output, self._outputs))
            self._outputs = {}

    def _gave(self, name: str, output: Any) -> None:
        if self._calls is not None:
            self._outputs[name] = output
