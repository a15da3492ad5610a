"""Arguments of a call: copied when the call is made, and written to checkpoints as plain types and tensors."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prox24_lightning.utils.tensors import map_leaves
from prox24_lightning.weights.sharded import is_sharded

_PLAIN = (bool, int, float, str, type(None), Tensor, nn.Parameter)
"""Themselves, no classes made of them: a checkpoint that holds such a class cannot be read without pickle's code."""


def copied_arguments(value: Any, *, detach: bool = True) -> Any:
    """Return a copy of arguments that later changes in place do not reach: tensors, containers, objects that hold them.

    A tensor that stands in several places is copied once.

    Args:
        detach: cut the copies off from autograd; they ask for gradients where the originals do.

    Raises:
        ValueError: for an iterator, which can be read only once, and for what is no batch.
    """
    copies: dict[int, tuple[Any, Any]] = {}

    def copy(leaf: Any) -> Any:
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf, _copied(leaf, detach)
        return copies[id(leaf)][1]

    return map_leaves(copy, value)


def _copied(leaf: Any, detach: bool) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if detach else leaf.clone()
    if isinstance(leaf, torch.Generator):
        return leaf.clone_state()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, set):
        return set(leaf)
    if isinstance(leaf, Iterator):
        raise ValueError(f"an argument is a {type(leaf).__name__}, which can be read only once")
    return leaf


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold ``value`` as it is: tensors, numbers, text, and containers of them."""
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) in _PLAIN and not (isinstance(value, Tensor) and is_sharded(value))


def form_of(value: Any) -> str:
    """Return a description of how ``value`` is built: two values of one form differ in their leaves alone."""
    leaves: list[str] = []

    def note(leaf: Any) -> Any:
        leaves.append(type(leaf).__qualname__)
        return leaf

    map_leaves(note, value)
    return f"{_containers(value)}: {' '.join(leaves)}"


def leaves_of(value: Any) -> list[dict[str, Any]]:
    """Return the leaves of ``value`` as plain types and tensors, by kind. :func:`with_leaves` undoes it."""
    leaves: list[dict[str, Any]] = []

    def note(leaf: Any) -> Any:
        leaves.append(_encoded(leaf))
        return leaf

    map_leaves(note, value)
    return leaves


def with_leaves(template: Any, leaves: list[dict[str, Any]], device: torch.device) -> Any:
    """Return a value built like ``template``, of the same form, with other leaves; tensors go to ``device``."""
    waiting = iter(leaves)
    return map_leaves(lambda leaf: _decoded(next(waiting), leaf, device), template)


def _encoded(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        return {"tensor": leaf.detach().cpu(), "requires_grad": leaf.requires_grad}
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        return {"array": torch.from_numpy(np.ascontiguousarray(leaf).copy())}
    if isinstance(leaf, np.generic):
        return {"numpy": leaf.item() if leaf.dtype.kind in "biufU" else None}
    if isinstance(leaf, enum.Enum):
        return {"enum": leaf.name}
    if isinstance(leaf, torch.Generator):
        return {"generator": leaf.get_state()}
    if isinstance(leaf, torch.Size):
        return {"size": list(leaf)}
    if type(leaf) in _PLAIN:
        return {"plain": leaf}
    return {}  # a function, a dtype, ...: the template's


def _decoded(leaf: dict[str, Any], template: Any, device: torch.device) -> Any:
    if "tensor" in leaf:
        return leaf["tensor"].to(device).requires_grad_(leaf["requires_grad"])
    if "array" in leaf:
        return leaf["array"].numpy().astype(template.dtype)
    if leaf.get("numpy") is not None:
        return type(template)(leaf["numpy"])
    if "enum" in leaf:
        return type(template)[leaf["enum"]]
    if "generator" in leaf:
        generator = torch.Generator(template.device)
        generator.set_state(leaf["generator"].cpu())
        return generator
    if "size" in leaf:
        return torch.Size(leaf["size"])
    return leaf.get("plain", template)


def _containers(value: Any) -> str:
    """The classes that ``value`` is nested in, with the keys of mappings."""
    if isinstance(value, torch.Size):
        return "Size"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__qualname__}({', '.join(map(_containers, value))})"
    if hasattr(value, "items") and hasattr(value, "keys") and not isinstance(value, Tensor):
        try:
            return f"{type(value).__qualname__}({', '.join(f'{key}={_containers(one)}' for key, one in value.items())})"
        except Exception:  # a mapping of its own kind
            return type(value).__qualname__
    return type(value).__qualname__
