"""Record the calls of one module, and the outputs of blocks inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prox24_lightning.calibration.calls.hooks import Hook, after_call, remove_all
from prox24_lightning.utils.tensors import map_tensors


@dataclass(frozen=True)
class RecordedCall:
    """One call of the module: arguments (copies if ``copy_inputs``), output, outputs of inner blocks by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    blocks: dict[str, Any]


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
        self._handles = [after_call(module, self._after_call, traced=True)]
        if copy_inputs:
            before: Any = Hook(module, self._before_call, traced=True)
            if getattr(module, "_compiled_call_impl", None) is not None:
                before = torch.compiler.disable(before)  # module.compile() would make a graph of the copies
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for name, block in (blocks or {}).items():
            self._handles.append(after_call(block, partial(self._after_block, name), traced=True))

    def close(self) -> None:
        """Remove every hook."""
        remove_all(self._handles)

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
            self._inputs.append(_copied((args, kwargs)))

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is not None:
            if self._inputs:
                args, kwargs = self._inputs.pop()
            self._calls.append(RecordedCall(args, kwargs, output, self._outputs))
            self._outputs = {}

    def _after_block(
        self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._calls is not None:
            self._outputs[name] = output


def _copied(arguments: Any) -> Any:
    """Return the arguments with copies of their tensors, in simple steps: compiled code traces them."""
    try:
        return map_tensors(_copy, arguments)
    except ValueError:  # an object that is no batch, but a part of the program
        return tree_map_only(Tensor, _copy, arguments)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
