"""Record the calls of one module, with what its inner blocks gave out, from outside of any compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class RecordedCall:
    """One call of the module: its arguments, what it returned, and the outputs of the watched blocks by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    blocks: dict[str, Any]


class CallRecorder:
    """Watches ``module``, and ``blocks`` inside of it, while :meth:`recording`.

    A forward hook sees a call of ``torch.compile(module)`` from outside of the compiled graph. A module compiled in
    place (``module.compile()``) runs its hooks inside of the graph; there the compiled call itself is wrapped.
    """

    def __init__(self, module: nn.Module, blocks: Mapping[str, nn.Module] | None = None) -> None:
        self._calls: list[RecordedCall] | None = None
        self._outputs: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is None:
            self._keep(module.register_forward_hook(self._called, with_kwargs=True))
        else:

            def call(*args: Any, **kwargs: Any) -> Any:
                output = compiled(*args, **kwargs)
                self._called(module, args, kwargs, output)
                return output

            module._compiled_call_impl = call

            def restore() -> None:
                module._compiled_call_impl = compiled

            self._undo.append(restore)
        for name, block in (blocks or {}).items():
            self._keep(block.register_forward_hook(lambda _module, _args, output, name=name: self._gave(name, output)))

    def close(self) -> None:
        """Stop watching."""
        while self._undo:
            self._undo.pop()()

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

    def _keep(self, handle: RemovableHandle) -> None:
        self._undo.append(handle.remove)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is not None:
            self._calls.append(RecordedCall(args, kwargs, output, self._outputs))
            self._outputs = {}

    def _gave(self, name: str, output: Any) -> None:
        if self._calls is not None:
            self._outputs[name] = output
