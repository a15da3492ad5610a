"""Find the attributes that hold a module, and exchange it under all of its names."""

from __future__ import annotations

from torch import nn

from prox24_lightning.convert.eligibility import named_layers

Slot = tuple[nn.Module, str]
"""A parent module and the attribute that holds the child."""


def slots_by_name(model: nn.Module) -> dict[str, list[Slot]]:
    """Return clean module name -> every slot that holds the module, also under other names; none for the root."""
    slots: dict[int, list[Slot]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, attribute))
    return {name: slots.get(id(module), []) for name, module in named_layers(model)}


def module_in(slots: list[Slot]) -> nn.Module:
    """Return the module that the slots hold."""
    parent, attribute = slots[0]
    module = parent._modules[attribute]
    if module is None:
        raise AttributeError(f"{type(parent).__name__} has no submodule {attribute!r}")
    return module


def exchange(slots: list[Slot], module: nn.Module) -> None:
    """Put a module into every slot."""
    for parent, attribute in slots:
        parent._modules[attribute] = module
