"""Compiled code that runs as plain Python for a while, so that hooks in it are run."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class EagerCode:
    """Has all compiled code run eagerly from :meth:`begin` to :meth:`end`; of several, for as long as one asks.

    Hooks that were not there when code was compiled are not run by it; code compiled with ``fullgraph=True`` bears none
    at all that ends a graph.
    """

    _asking: ClassVar[list[EagerCode]] = []
    _stance: ClassVar[Any] = None

    def begin(self) -> None:
        """Run compiled code eagerly from now on; safe to call twice."""
        if not self._asking:
            EagerCode._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        if self not in self._asking:
            self._asking.append(self)

    def end(self) -> None:
        """Run compiled code as it is, unless another one asks; safe to call twice, and without :meth:`begin`."""
        if self in self._asking:
            self._asking.remove(self)
            if not self._asking:
                self._stance.__exit__(None, None, None)


def inside_compiled(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose calls are part of compiled code: hooks must be there before that is compiled."""
    return {inner for module in model.modules() if _is_compiled(module) for inner in _inside(module)}


def inside_whole_graphs(model: nn.Module) -> set[nn.Module]:
    """Return those that are part of code compiled with ``fullgraph=True``: it bears hooks only where it runs eagerly.

    What wraps a module's code says so in places that differ between kinds of compilation and releases of torch.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        wrappers = [
            getattr(module, "dynamo_ctx", None),
            (getattr(module, "_compiler_ctx", None) or {}).get("dynamo_ctx"),
            *_captured(getattr(module, "_compiled_call_impl", None)),
            *_captured(vars(module).get("forward")),
        ]
        if any(getattr(one, name, None) is True for one in wrappers for name in ("fullgraph", "error_on_graph_break")):
            found.update(_inside(module))
    return found


def _is_compiled(module: nn.Module) -> bool:
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or bool(getattr(module, "_compiler_ctx", None))
        or "forward" in vars(module)
    )


def _inside(module: nn.Module) -> list[nn.Module]:
    """The wrapper of a compiled module is called from outside of the code."""
    return list(getattr(module, "_orig_mod", module).modules())


def _captured(function: Any) -> list[Any]:
    cells = getattr(getattr(function, "__func__", function), "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]
