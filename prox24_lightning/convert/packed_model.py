"""Which weights of a model are stored packed, and a packed file back into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prox24_lightning.convert.eligibility import named_layers
from prox24_lightning.convert.packed import PACKED_DTYPES
from prox24_lightning.convert.packed_reader import PackedFile
from prox24_lightning.groups import clean_name, fit_groups, matching
from prox24_lightning.mask import Violations, violations_24


@dataclass(frozen=True)
class Packable:
    """What :func:`find_packable` decided: weight name -> dimension of its groups; and name -> why it stays as it is."""

    dims: dict[str, int]
    dense: dict[str, str]


def find_packable(
    model: nn.Module, *, targets: Sequence[str] | None = None, skip: Sequence[str] | None = None
) -> Packable:
    """Every linear or convolution weight that is strictly 2:4 along its inputs, or else along its outputs.

    Args:
        model: on any device; nothing is changed.
        targets: shell patterns of weight or module names that must be packed; None takes every weight that can be.
        skip: patterns of what is stored dense whatever it holds.

    Raises:
        ValueError: for a target that is not 2:4 or cannot be packed; for a weight of which most groups are 2:4 but not
            all, which is a damaged one; by name, with the first violations. For a pattern that matches nothing.
    """
    dims: dict[str, int] = {}
    dense: dict[str, str] = {}
    unused = {*(targets or ()), *(skip or ())}
    seen: set[int] = set()
    for module_name, module in named_layers(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            wanted, skipped = (matching({name, module_name}, patterns or ()) for patterns in (targets, skip))
            unused -= {*wanted, *skipped}
            if skipped or (targets is not None and not wanted):
                dense[name] = f"skip={skipped[0]!r}" if skipped else "not among the targets"
                continue
            reason, dim = fit_groups(module, parameter_name, parameter, "row")
            if reason is None and parameter.dtype not in PACKED_DTYPES:
                reason = f"{parameter.dtype} is not packed"
            if reason is None:
                found = _look(parameter, dim)
                if isinstance(found, int):
                    dims[name] = found
                    continue
                if found.count <= found.groups // 2:
                    raise ValueError(
                        f"{name} is not 2:4, though most of it is: {found}; prune it again, or store it dense: "
                        f"skip={name!r}"
                    )
                reason = f"not 2:4: {found.count} of {found.groups} groups, first at {found.first[0]}"
            if wanted:
                raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be packed: {reason}")
            dense[name] = reason
    if unused:
        raise ValueError(f"{sorted(unused)[0]!r} matches no weight of the model; check it for typing errors")
    return Packable(dims, dense)


def _look(weight: Tensor, dim: Any) -> int | Violations:
    """The dimension along which the weight is 2:4, or what is wrong along its inputs, ``dim``."""
    found = violations_24(weight, dim=dim, limit=3)
    if not found:
        return dim
    other = 1 - dim
    if weight.shape[other] % 4 == 0 and not violations_24(weight, dim=other, limit=0):
        return other
    return found


class EmptyOnMeta(TorchFunctionMode):
    """While it is on, ``torch.empty`` makes meta tensors, so a model is built without the memory of its weights.

    Layers allocate weights with ``torch.empty``, and what they compute for themselves (rotary frequencies, position
    numbers) by other functions: those buffers get their values.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_packed(model: nn.Module, file: PackedFile, *, device: torch.device | str | None = None) -> None:
    """Give ``model`` the tensors of a packed file, expanded, one after the other: each replaces the model's own.

    Args:
        model: of the structure that was written; its weights may be on the meta device. Dtypes become the file's.
        file: an open one.
        device: where the tensors go; None leaves each where the model has it (from meta: CPU).

    Raises:
        ValueError: if names or shapes differ, before anything is changed; if the file is damaged.
    """
    places = {name: (held, attribute) for name, held, attribute in _places(model)}
    missing, unknown = sorted(set(places) - set(file.names)), sorted(set(file.names) - set(places))
    if missing or unknown:
        raise ValueError(f"{file.path} is of another model: it lacks {missing[:3]}, and the model lacks {unknown[:3]}")
    for name, (held, attribute) in places.items():
        if file.shape(name) != tuple(held[attribute].shape):
            raise ValueError(f"{name} has shape {tuple(held[attribute].shape)}, and {file.shape(name)} in {file.path}")
    done: dict[str, Tensor] = {}
    for name, (held, attribute) in places.items():
        owner, old = file.owner(name), held[attribute]
        if owner not in done:
            new = file.read(owner, device or ("cpu" if old.is_meta else old.device))
            done[owner] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        held[attribute] = done[owner]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is a meta tensor and no part of the state dict: build the model with its values")
    if device is not None:
        model.to(device)


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, dictionary and key of every tensor in the state dict; shared ones under each of their names."""
    known = {clean_name(name) for name in model.state_dict()}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "_orig_mod"):
            continue
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                name = clean_name(f"{module_name}.{attribute}" if module_name else attribute)
                if tensor is not None and name in known:
                    yield name, held, attribute
