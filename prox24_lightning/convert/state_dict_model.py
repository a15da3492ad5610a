"""Turn a state dict into layers under their own names, where the model's class is not at hand."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[Any]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def layers_of(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a tree of modules with a layer for every floating-point ``*.weight`` of two or more dimensions.

    A matrix becomes a linear layer, or an embedding if the name contains ``emb``; more dimensions become a convolution
    with one group. The layers can be checked and timed one by one, but the tree cannot be called. Every other tensor is
    a buffer, so the tree's state dict is the whole state. Tensors are shared with ``state``, and layers share a weight
    where the state does.

    Raises:
        ValueError: if there is no such weight, or a name is not possible in a module.
    """
    root = nn.Module()
    placed: set[str] = set()
    weights: dict[Hashable, nn.Parameter] = {}
    for name, weight in state.items():
        stem, _, last = name.rpartition(".")
        if last != "weight" or not stem or not weight.is_floating_point() or not 2 <= weight.dim() <= 5:
            continue
        memory = weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
        layer = _layer(
            stem, weights.setdefault(memory, nn.Parameter(weight, requires_grad=False)), state.get(f"{stem}.bias")
        )
        placed |= {f"{stem}.{own}" for own, _ in layer.named_parameters()}
        *path, leaf = stem.split(".")
        parent = _reach(root, path)
        before = parent._modules.get(leaf)
        parent.add_module(leaf, layer)
        for child, module in before.named_children() if before is not None else ():
            layer.add_module(child, module)
    if not placed:
        raise ValueError("the file holds no weight of two or more dimensions whose name ends in '.weight'")
    for name in (name for name in state if name not in placed):
        *path, leaf = name.split(".")
        try:
            _reach(root, path).register_buffer(leaf, state[name])
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{name} is not possible in a module: {error}") from error
    return root


def _reach(root: nn.Module, path: Sequence[str]) -> nn.Module:
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _layer(name: str, weight: nn.Parameter, bias: Tensor | None) -> nn.Module:
    layer: nn.Module
    if weight.dim() > 2:
        kind = _CONVOLUTIONS[weight.dim()]
        layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, device="meta")
    elif "emb" in name.rpartition(".")[2]:
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None and not isinstance(layer, nn.Embedding):
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
