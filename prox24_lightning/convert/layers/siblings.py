"""Find the linear layers of a model that read one input (query, key and value; gate and up), in one call of it.

Decoding runs them as one product, and the conversion lets them choose their form together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.weights.names import clean_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Siblings:
    """Two or more linear layers of one parent that read one input, in the order in which they are called.

    ``repeated``: one of them is called more than once for a token.
    """

    names: tuple[str, ...]
    members: tuple[nn.Module, ...]
    repeated: bool


def find_siblings(model: Any) -> list[Siblings]:
    """Return the siblings of a language model, which is called with one token; none if that fails.

    Args:
        model: callable as ``model(input_ids, use_cache=False)``, in evaluation mode.
    """
    calls = _record(model)
    times = Counter(id(module) for _, module, _, _ in calls)
    found = []
    for _, run in groupby(calls, lambda call: (id(call[2]), call[3], call[0].rpartition(".")[0])):
        names, members = zip(*((name, module) for name, module, _, _ in run), strict=True)
        if len(members) > 1:
            found.append(Siblings(names, members, any(times[id(member)] > 1 for member in members)))
    return found


@torch.inference_mode(False)  # its tensors do not say whether they were changed in between
@torch.no_grad()
def siblings_inside(model: nn.Module) -> list[Siblings]:
    """Return the siblings of the language model of transformers that is ``model`` or a part of it, by their full names.

    None where there is no such model, or its weights are spread over processes. It is called in evaluation mode.
    """
    for prefix, part in model.named_modules():
        if not callable(getattr(part, "generate", None)) or not hasattr(part, "config"):
            continue
        if any(type(parameter.data) is not Tensor or parameter.is_meta for parameter in part.parameters()):
            return []
        with _evaluating(part):
            found = find_siblings(part)
        if found:
            start = f"{prefix}." if prefix else ""
            return [replace(one, names=tuple(clean_name(start + name) for name in one.names)) for one in found]
    return []


def _record(model: Any) -> list[tuple[str, nn.Module, Tensor, int]]:
    """Return name, layer, input and the input's version of every call of a linear layer, for one token."""
    calls: list[tuple[str, nn.Module, Tensor, int]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # What is called in another way than with a tensor alone shares its input with nothing.
            alone = len(args) == 1 and not kwargs and type(args[0]) is Tensor
            given = args[0] if alone else torch.empty(0)
            calls.append((name, module, given, given._version))

        return note

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, SemiStructuredLinear))
    ]
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:  # of the model: it has been called with a prompt before, not like this
        log.info("layers of one input are not found: one token alone cannot be read: %s", error)
        return []
    finally:
        for handle in hooks:
            handle.remove()
    return calls


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
