"""Output heads: the last weights on the way to a model's output, which stay dense unless a target names them.

A model's own word counts first (``get_output_embeddings``, ``get_classifier``, a ``pretrained_cfg``), then its
structure: what a task model of transformers adds behind its base model, the last weight of a part that is named as a
head, and the last weight of a class whose outputs no other layer takes. The last layer of a bare ``nn.Sequential`` is
none of these: nothing tells a network that ends there from one that is a part of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.names import clean_name

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LISTS = (nn.ModuleList, nn.ModuleDict)
_HEAD = re.compile(
    r"(?!pre_)(.*_)?(heads?|classifiers?|score|logits|qa_outputs|fc_out|(output|text|visual)_projection)(_\w*)?|aux_?logits",
    re.IGNORECASE,
)
"""Names of modules that compute a model's outputs."""
_ATTENTION = re.compile(r"(.*_)?(attn|attention|multi_?head|self|cross)(_.*|$)", re.IGNORECASE)
"""Names that hold the word "head", but are of attention."""


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Return the layers of ``model`` that compute its outputs."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        heads.update(_declared(module))
        heads.update(_behind_base_model(module))
    heads.update(_named(model))
    heads.update(_of_classes(model))
    inner = _wrappers(model)[-1]
    taken = set(_sizes_taken(inner, heads))
    for part in (inner, *inner.children()):
        heads.update(_unconsumed(part, heads, taken))
    return heads


def _declared(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that the model itself calls its head."""
    for method in ("get_output_embeddings", "get_classifier"):
        get = getattr(module, method, None)
        try:
            found: Any = get() if callable(get) else None
        except Exception:  # a method of another meaning, or of a model without a head: no reason to end a run
            continue
        for part in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(part, nn.Module):
                yield from list(_last([part])) or [part]
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    names = config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)
    parts = dict(module.named_modules()) if names else {}
    for name in [names] if isinstance(names, str) else names or ():
        if name in parts:
            yield from _last([parts[name]])


def _behind_base_model(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the last layer that a task model of transformers registers behind its base model."""
    prefix = getattr(module, "base_model_prefix", None)
    base = getattr(module, prefix, None) if isinstance(prefix, str) and prefix else None
    if isinstance(base, nn.Module) and base is not module:
        children = list(module.children())
        if base in children:
            yield from _last(children[children.index(base) + 1 :])


def _named(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the last layer of each outermost module that is named as a head; of a list of heads each one's."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    repeated = {name for name, module in modules.items() if _is_repeated(module)}
    for name, module in modules.items():
        *above, last = name.split(".")
        if not _is_head(last) or any(_is_head(part) for part in above):
            continue
        around = {".".join(above[:end]) for end in range(len(above))}
        if not repeated.isdisjoint(around) and not isinstance(module, _LAYERS):
            continue  # the heads of attention, say
        for part in module.children() if isinstance(module, _LISTS) else (module,):
            yield from _last([part])


def _is_repeated(module: nn.Module) -> bool:
    """Whether a module is a list of blocks."""
    like = isinstance(module, nn.Sequential) and len(module) > 1 and len({type(part) for part in module}) == 1
    return like or isinstance(module, nn.ModuleList)


def _is_head(name: str) -> bool:
    return bool(_HEAD.fullmatch(name)) and not _ATTENTION.fullmatch(name)


def _of_classes(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the last layer if it has as many outputs as the model says that there are classes."""
    wrappers = _wrappers(model)
    holders = [*wrappers, *(getattr(module, "hparams", None) for module in wrappers)]
    classes = [getattr(holder, name, None) for holder in holders for name in ("num_classes", "num_labels")]
    numbers = {count for count in classes if isinstance(count, int)}
    for layer in _last([model]):
        if _sizes(layer)[1] in numbers:
            yield layer


def _unconsumed(model: nn.Module, heads: set[nn.Module], taken: set[int]) -> Iterator[nn.Module]:
    """Yield the last layers of a model's class whose outputs have a size that nothing else takes.

    Args:
        model: wrappers around it are removed first.
        heads: layers that are known as heads.
        taken: the sizes of inputs of all that is no head.
    """
    if isinstance(model, (nn.Sequential, *_LISTS)):
        return
    layers = [layer for layer in model.modules() if _is_layer(layer)]
    direct = {getattr(child, "_orig_mod", child) for child in model.children()}
    known = not heads.isdisjoint(layers)
    first: nn.Module | None = None
    for layer in reversed(layers):
        if layer in heads:
            first = first or layer
            continue
        sizes = _sizes(layer)
        beside = first is None or sizes[0] == _sizes(first)[0] or sizes[1] == _sizes(first)[1]
        if layer not in direct or not beside or sizes[1] in taken or (known and first is None):
            return
        first = layer
        yield layer


def _sizes_taken(model: nn.Module, heads: set[nn.Module]) -> Iterator[int]:
    """Yield every size that something in the model can take as an input: of layers, norms, positions, recurrences."""
    for module in model.modules():
        if module in heads:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if _is_layer(module):
                if name == "weight":
                    yield _sizes(module)[0]
            elif not isinstance(module, nn.Embedding):
                yield from parameter.shape


def _last(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the last layer with a weight inside of ``modules``, in the order of registration."""
    layers = [layer for module in modules for layer in module.modules() if _is_layer(layer)]
    yield from layers[-1:]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or is_transposed_linear(module)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the number of inputs and of outputs of a layer."""
    shape = layer.get_parameter("weight").shape if "weight" in layer._parameters else (0, 0)
    if is_transposed_linear(layer):
        return shape[0], shape[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return int(getattr(layer, "in_channels", shape[1])), int(getattr(layer, "out_channels", shape[0]))


def _wrappers(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and what is inside of it, down to the first that holds more than one module with weights."""
    found = [model]
    while True:
        holding = [child for child in found[-1].children() if any(True for _ in child.parameters())]
        own = any(True for _ in found[-1].parameters(recurse=False))
        if own or len(holding) != 1 or isinstance(found[-1], (nn.Sequential, *_LISTS)):
            return found
        found.append(holding[0])
