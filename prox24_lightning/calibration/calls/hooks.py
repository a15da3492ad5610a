"""Hooks that stay with the module they were registered on: copies and pickles of the module do not run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Listener = Callable[..., Any]

_silent: ContextVar[bool] = ContextVar("silent", default=False)


class Hook:
    """A forward hook of one module, which does nothing for any other, nor once it is copied or pickled.

    Args:
        module: whose calls count; None: none.
        listener: called with the module, its arguments and, after the call, its output.
        traced: compiled code that contains the module traces the listener, too; else it ends there, and goes on behind.
    """

    def __init__(
        self, module: nn.Module | None = None, listener: Listener | None = None, *, traced: bool = False
    ) -> None:
        self._module = module
        self._listener = listener
        self._notify: Listener | None = listener
        if listener is not None and not traced:
            self._notify = torch.compiler.disable(self._tell_listener)

    def __call__(self, module: nn.Module, *call: Any) -> None:
        if self._notify is not None and module is self._module:
            self._notify(module, *call)

    def _tell_listener(self, module: nn.Module, *call: Any) -> None:
        if self._listener is not None and not _silent.get():
            self._listener(module, *call)

    def __copy__(self) -> Hook:
        return Hook()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def before_call(module: nn.Module, listener: Listener, *, first: bool = False, traced: bool = False) -> RemovableHandle:
    """Have ``listener(module, args, kwargs)`` called before each call of ``module``.

    Args:
        first: ahead of other hooks, on what the caller passes; else on what they make of it (tensor parallelism turns
            inputs into ``DTensor`` there).
    """
    return module.register_forward_pre_hook(Hook(module, listener), prepend=first, with_kwargs=True)


def after_call(module: nn.Module, listener: Listener, *, traced: bool = False) -> RemovableHandle:
    """Have ``listener(module, args, kwargs, output)`` called after each call of ``module``, behind other hooks."""
    return module.register_forward_hook(Hook(module, listener, traced=traced), with_kwargs=True)


@contextmanager
def silent_hooks() -> Iterator[None]:
    """Let no hook of this module be run within the context: the calls made there are no training."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def in_backward() -> bool:
    """Whether the call is made in a backward pass: by activation checkpointing."""
    return torch._C._current_graph_task_id() >= 0


def remove_all(handles: Iterable[RemovableHandle]) -> None:
    """Remove every hook."""
    for handle in handles:
        handle.remove()
