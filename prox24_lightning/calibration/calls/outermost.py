"""Find the outermost modules that training calls and that hold all weights to prune."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def outermost_modules(root: nn.Module, modules: Sequence[nn.Module], *, root_is_called: bool) -> list[nn.Module]:
    """The outermost modules that are called and hold all ``modules`` between them.

    That is the smallest module that holds them all, if it is no bare list; its compiled wrapper where there is one;
    and its parts where it is ``root`` and ``root`` itself is never called (a LightningModule: its ``training_step``
    is).
    """
    paths = _paths(root, modules)
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))]
    while len(common) > 1 and _is_list(common[-1]):
        common = common[:-1]
    compiled = [module for module in common if hasattr(module, "_orig_mod")]
    outermost = compiled[0] if compiled else common[-1]
    if outermost is root and not root_is_called:
        return parts_with(root, modules)
    return [outermost]


def parts_with(module: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The children of ``module`` that hold any of ``modules``, looking through bare lists."""
    wanted = set(modules)
    found: list[nn.Module] = []
    for child in module.children():
        if wanted.intersection(child.modules()):
            found += parts_with(child, modules) if _is_list(child) else [child]
    return found


def _paths(root: nn.Module, modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """For each of ``modules``, the modules from ``root`` down to it."""
    names = {module: name for name, module in root.named_modules()}
    result = []
    for module in modules:
        path, current = [root], root
        for part in names[module].split(".") if names[module] else ():
            current = current.get_submodule(part)
            path.append(current)
        result.append(path)
    return result


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
