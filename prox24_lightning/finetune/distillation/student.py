"""Find the module whose output is distilled."""

from __future__ import annotations

from torch import nn

from prox24_lightning.weights.names import clean_name


def find_student(root: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Return the submodule ``name`` of ``root``, or its only child with trainable parameters, with its name.

    Of a compiled module it is the outer one, which training calls.

    Raises:
        ValueError: if there is no such module, or several without a name.
    """
    children = [key for key, child in root.named_children() if any(value.requires_grad for value in child.parameters())]
    choices = ", ".join(repr(key) for key in children) or "none"
    if name is None:
        if len(children) != 1:
            raise ValueError(
                f"{type(root).__name__} has {len(children)} children that train ({choices}): name the one whose output "
                "is to be distilled with module=, or put those that work together into one module"
            )
        (name,) = children
    for key, module in root.named_modules():
        if key and clean_name(key) == name:
            return name, module
    raise ValueError(f"module={name!r} is not in {type(root).__name__}; its children that train: {choices}")
