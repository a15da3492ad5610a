"""Record the calls of one module, and the outputs of blocks inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class RecordedCall:
    """One call of the module: arguments (copies if ``copy_inputs``), output, outputs of inner blocks by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    blocks: dict[str, Any]


class _Hook:
    """Calls ``listener``; does nothing once it is copied or pickled with its module."""

    def __init__(self, listener: Callable[..., None] | None = None) -> None:
        self._listener = listener

    def __call__(self, *call: Any) -> None:
        if self._listener is not None:
            self._listener(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class CallRecorder:
    """Record the calls of ``module`` and the outputs of ``blocks`` inside it within :meth:`recording`.

    A forward hook sees the calls of a compiled module, ``torch.compile(module)`` or ``module.compile()``, from outside
    its graph, which is not built again. Inside a larger compiled graph (a compiled LightningModule) the hook is
    traced with the rest, if it was there when the graph was built.

    Args:
        module: whose calls are recorded.
        blocks: modules inside it, by name.
        copy_inputs: record detached copies of the arguments as they are when the call begins: the module may change
            the originals in place, and a later callee must not, since the backward pass still needs them.
    """

    def __init__(
        self, module: nn.Module, blocks: Mapping[str, nn.Module] | None = None, *, copy_inputs: bool = False
    ) -> None:
        self._calls: list[RecordedCall] | None = None
        self._outputs: dict[str, Any] = {}
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._handles = [module.register_forward_hook(_Hook(self._after_call), with_kwargs=True)]
        if copy_inputs:
            before: Callable[..., None] = _Hook(self._before_call)
            if getattr(module, "_compiled_call_impl", None) is not None:
                before = torch.compiler.disable(before)  # module.compile() would make a graph of the copies
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for name, block in (blocks or {}).items():
            self._handles.append(block.register_forward_hook(_Hook(partial(self._after_block, name))))

    def close(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def recording(self) -> Iterator[list[RecordedCall]]:
        """Return the list of calls within the context, in order."""
        calls: list[RecordedCall] = []
        self._calls = calls
        try:
            yield calls
        finally:
            # Blocks that activation checkpointing computes again in the backward pass are not recorded.
            self._calls = None
            self._outputs = {}
            self._inputs = []

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls is not None:
            self._inputs.append(tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs)))

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is not None:
            if self._inputs:
                args, kwargs = self._inputs.pop()
            self._calls.append(RecordedCall(args, kwargs, output, self._outputs))
            self._outputs = {}

    def _after_block(self, name: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._calls is not None:
            self._outputs[name] = output
