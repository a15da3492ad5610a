"""Regional compilation: each repeated block of a model compiled by itself, which takes seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.blocks import find_blocks


def compile_blocks(model: nn.Module) -> int:
    """Compile the ``forward`` of every block of ``model`` that :func:`find_blocks` finds; their number is returned.

    The blocks share their code, so the compiler works once for all of them. Names of parameters and modules stay,
    hooks on the blocks run outside of the graphs, and copies of the model are compiled too. While a layer inside of a
    block has a hook, the block runs as it was written: the compiler takes no notice of hooks that come and go.
    """
    blocks = find_blocks(model)
    for block in blocks.modules:
        block.forward = CompiledForward(block)
    return len(blocks)


class CompiledForward:
    """The compiled ``forward`` of ``module``, made at the first call.

    Stored on the module itself, where a plain compiled function would still run the original's weights after
    ``copy.deepcopy(module)``; this object is copied along and belongs to the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = (module for module in self.module.modules() if module is not self.module)
        if any(module._forward_pre_hooks or module._forward_hooks for module in inner):
            return type(self.module).forward(self.module, *args, **kwargs)
        if self._compiled is None:
            self._compiled = torch.compile(MethodType(type(self.module).forward, self.module))
        return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "_compiled": None}
