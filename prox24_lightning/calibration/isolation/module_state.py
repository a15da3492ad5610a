"""What a forward pass may change in a module: buffers, attributes, modes; put aside and put back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What every module has: parameters, buffers, children, hooks."""
_CONTAINERS = (list, dict, set, deque)


class ModuleState:
    """The buffers, attributes and modes of a module and all modules inside it, as they are now.

    Nothing is written to the module's own buffers: copies take their places (:meth:`install`), so that what autograd
    has saved of them stays valid.

    Args:
        module: whose state it is.
        values: copy the values of the buffers, for :meth:`install`.
    """

    def __init__(self, module: nn.Module, *, values: bool = True) -> None:
        self._modules = list(module.modules())
        self._buffers = [dict(each._buffers) for each in self._modules]
        self._values: dict[int, Tensor] = {}
        if values:
            self._values = {id(buffer): buffer.detach().clone() for held in self._buffers for buffer in _tensors(held)}
        self._attributes = [_attributes(each) for each in self._modules]
        self._contents = {
            id(value): copy.copy(value)
            for held in self._attributes
            for value in held.values()
            if isinstance(value, _CONTAINERS)
        }

    def install(self, *, again: bool = False) -> None:
        """Give the module this state, with copies in the places of its buffers.

        Args:
            again: the state is to be installed once more later: forward passes must not change its copies.
        """
        fresh = {key: value.clone() if again else value for key, value in self._values.items()}
        for each, held in zip(self._modules, self._buffers, strict=True):
            each._buffers.clear()
            for name, buffer in held.items():
                each._buffers[name] = None if buffer is None else fresh[id(buffer)]
        self.install_attributes()

    def install_attributes(self) -> None:
        """Give the module the attributes and modes of this state."""
        for each, held in zip(self._modules, self._attributes, strict=True):
            for name in [name for name in vars(each) if name not in _OWN and name not in held]:
                del vars(each)[name]
            for name, value in held.items():
                vars(each)[name] = value
                if id(value) in self._contents:
                    _refill(value, self._contents[id(value)])

    def restore(self) -> None:
        """Give the module its own buffers back, and its attributes and modes.

        A buffer that has moved to another device since is followed there.
        """
        for each, held in zip(self._modules, self._buffers, strict=True):
            now = dict(each._buffers)
            each._buffers.clear()
            for name, buffer in held.items():
                moved = now.get(name)
                if buffer is not None and moved is not None and moved.device != buffer.device:
                    buffer = buffer.to(moved.device)
                each._buffers[name] = buffer
        self.install_attributes()

    def changed_attributes(self, later: ModuleState) -> list[str]:
        """Return the names of the attributes that differ in ``later``, modes left aside."""
        changed = []
        for each, before, after in zip(self._modules, self._attributes, later._attributes, strict=False):
            for name in {*before, *after} - {"training"}:
                old, new = before.get(name), after.get(name)
                same = old is new and self._contents.get(id(old)) is None
                if not same and not _equal(self._contents.get(id(old), old), later._contents.get(id(new), new)):
                    changed.append(f"{type(each).__name__}.{name}")
        return sorted(changed)


@contextmanager
def kept(module: nn.Module) -> Iterator[ModuleState]:
    """Put the module's buffers, attributes and modes back afterwards, also after an error."""
    state = ModuleState(module)
    state.install()
    try:
        yield state
    finally:
        state.restore()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _tensors(buffers: dict[str, Tensor | None]) -> list[Tensor]:
    return [buffer for buffer in buffers.values() if buffer is not None]


def _refill(container: Any, content: Any) -> None:
    """Give a container the entries that it had, if it has others now."""
    if isinstance(container, dict):
        if container.keys() != content.keys() or any(container[key] is not content[key] for key in content):
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old is new or (old.shape == new.shape and old.dtype == new.dtype and bool((old == new).all()))
    if isinstance(old, (list, tuple, deque)) and type(old) is type(new):
        return len(old) == len(new) and all(map(_equal, old, new))
    if isinstance(old, dict) and type(old) is type(new):
        return old.keys() == new.keys() and all(_equal(old[key], new[key]) for key in old)
    try:
        return old is new or bool(old == new)
    except Exception:  # a comparison of the user's objects
        return False
