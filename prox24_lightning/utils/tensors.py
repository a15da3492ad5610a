"""Walk through the tensors inside arguments and outputs: containers, named tuples, dataclasses, batch objects."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_ATOMS = (
    *(Tensor, nn.Module, torch.Generator, torch.Size, torch.dtype, torch.device),
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum, range, slice),
    *(type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType),
)
_DEPTH, _OBJECTS = 8, 4096
"""Objects that are nested deeper, or hold more objects, are no batches but parts of a program: a trainer, say."""


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return ``value`` with every tensor inside replaced by ``change(tensor)``.

    Containers are those of ``torch.utils._pytree`` (tuples, lists, dictionaries, named tuples, ordered dictionaries,
    what libraries register), other mappings and sequences, and objects by their attributes (dataclasses, batches).

    Raises:
        ValueError: for objects that hold themselves, or more than a batch ever does.
    """
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with every leaf (tensor, number, text, ...) replaced by ``change(leaf)``; see
    :func:`map_tensors`. An object in which nothing changes stays the same object."""
    return _Walk(change).mapped(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors inside ``value``, in order; see :func:`map_tensors` for what is looked through."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def to_device(value: Any, device: torch.device | str, *, copy: bool = False) -> Any:
    """Move every tensor inside ``value`` to ``device``; ``copy`` also those that are there already."""
    return map_tensors(lambda tensor: tensor.to(device, copy=copy), value)


def without_inference(value: Any) -> Any:
    """Return ``value`` with copies in place of tensors that were made within ``torch.inference_mode()``: autograd takes
    none of those. Call it outside of that mode."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first entry of a tuple or list, if that is a tensor; else None."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


class _Walk:
    """One walk through nested values."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self._change = change
        self._objects = 0

    def mapped(self, value: Any, depth: int = 0) -> Any:
        # torch.Size is a leaf: pytree would make a plain tuple of it.
        return tree_map(lambda leaf: self._leaf(leaf, depth), value, is_leaf=lambda part: isinstance(part, torch.Size))

    def _leaf(self, leaf: Any, depth: int) -> Any:
        if isinstance(leaf, _ATOMS):
            return self._change(leaf)
        entries = dict(_entries(leaf))
        if not entries:
            return self._change(leaf)
        self._objects += 1
        if depth >= _DEPTH or self._objects > _OBJECTS:
            raise ValueError(f"{type(leaf).__name__} holds too many objects to be a batch")
        changed = {place: self.mapped(entry, depth + 1) for place, entry in entries.items()}
        if all(changed[place] is entry for place, entry in entries.items()):
            return leaf
        result = copy.copy(leaf)
        for (kind, key), entry in changed.items():
            if kind == "item":
                result[key] = entry
            else:
                object.__setattr__(result, key, entry)  # frozen dataclasses too
        return result


def _entries(leaf: Any) -> Iterator[tuple[tuple[str, Any], Any]]:
    """What an object holds, by kind (item or attribute) and key."""
    if isinstance(leaf, MutableMapping):
        # A wrapper of a dictionary (UserDict) shows the same entries as an attribute; as items they are enough.
        yield from ((("item", key), entry) for key, entry in leaf.items())
    elif isinstance(leaf, MutableSequence):
        yield from ((("item", index), entry) for index, entry in enumerate(leaf))
    elif isinstance(leaf, Mapping):
        return
    for name, entry in getattr(leaf, "__dict__", {}).items():
        if not (isinstance(leaf, MutableMapping) and isinstance(entry, dict)):
            yield ("attribute", name), entry
    for cls in type(leaf).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                yield ("attribute", name), getattr(leaf, name)
