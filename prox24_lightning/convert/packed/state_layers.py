"""The weights of a state dict as layers under their own names, where the class that they came from is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[Any]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def layers_of(state: Mapping[str, Tensor]) -> nn.Module:
    """A tree of modules with a layer for every floating-point ``*.weight`` of two or more dimensions.

    A matrix is taken for a linear layer, more dimensions for a convolution (of one group, for what the shape tells);
    an embedding cannot be told from a linear layer, except by a name that holds ``emb``. The tree can be judged and its
    layers timed one by one, but it cannot be called. Tensors are shared with ``state``.

    Raises:
        ValueError: if there is no such weight.
    """
    root = nn.Module()
    for name, weight in state.items():
        stem, _, last = name.rpartition(".")
        if last != "weight" or not stem or not weight.is_floating_point() or not 2 <= weight.dim() <= 5:
            continue
        layer = _layer(stem, weight, state.get(f"{stem}.bias"))
        parent = root
        *path, leaf = stem.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, layer)
    if not any(True for _ in root.children()):
        raise ValueError("the file holds no weight of two or more dimensions whose name ends in '.weight'")
    return root


def _layer(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer: nn.Module
    if weight.dim() > 2:
        kind = _CONVOLUTIONS[weight.dim()]
        layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, device="meta")
    elif "emb" in name.rpartition(".")[2]:
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None and not isinstance(layer, nn.Embedding):
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
