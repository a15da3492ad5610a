"""Record the calls of one module, with what its inner blocks gave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class RecordedCall:
    """One call of the module: its arguments, as copies where asked for, what it returned, and the outputs of the
    watched blocks by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    blocks: dict[str, Any]


class CallRecorder:
    """Watches ``module``, and ``blocks`` inside of it, while :meth:`recording`.

    A forward hook sees the calls of a compiled module, ``torch.compile(module)`` or ``module.compile()``, from outside
    of its graph, which need not be built again. Inside of a larger compiled graph (a compiled LightningModule) it
    is traced with the rest, if it was there when the graph was built.

    Args:
        module: whose calls are recorded.
        blocks: inside of it, by name.
        copy_inputs: record the arguments as they are when the call begins, detached: the module may change them in
            place, and whoever is called with them afterwards may not, as the backward pass still needs them.
    """

    def __init__(
        self, module: nn.Module, blocks: Mapping[str, nn.Module] | None = None, *, copy_inputs: bool = False
    ) -> None:
        self._calls: list[RecordedCall] | None = None
        self._outputs: dict[str, Any] = {}
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._handles = [module.register_forward_hook(self._called, with_kwargs=True)]
        if copy_inputs:
            begins: Callable[..., None] = self._begins
            if getattr(module, "_compiled_call_impl", None) is not None:
                begins = torch.compiler.disable(begins)  # module.compile() would make a graph of the copies
            self._handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
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
            self._inputs = []

    def _begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls is not None:
            self._inputs.append(tree_map(_copied, (args, kwargs)))

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is not None:
            if self._inputs:
                args, kwargs = self._inputs.pop()
            self._calls.append(RecordedCall(args, kwargs, output, self._outputs))
            self._outputs = {}

    def _gave(self, name: str, output: Any) -> None:
        if self._calls is not None:
            self._outputs[name] = output


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
