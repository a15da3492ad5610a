"""Find a model's repeated blocks, and call them with the arguments that the model passes.

Nothing about an architecture is written down here: the blocks are the largest list of like modules, and the
arguments (attention masks, position embeddings, flags) are whatever the model itself passes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prox24_lightning.utils.tensors import first_tensor
from prox24_lightning.weights.names import clean_name

SEQUENCE_SHARE = 0.8
"""Share of a model's parameters from which on a ``Sequential`` of like modules is taken for its blocks."""


@dataclass(frozen=True)
class Blocks:
    """``modules[i]`` is called ``names[i]``; ``whole`` says that the model itself is the only block."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.modules)

    def owns(self, index: int, module_name: str) -> bool:
        """Whether the module of that name is block ``index`` or lies in it."""
        return self.whole or f"{module_name}.".startswith(f"{self.names[index]}.")


def find_blocks(model: nn.Module, name: str | None = None, holding: Collection[nn.Module] | None = None) -> Blocks:
    """The repeated blocks of ``model``: its largest ``ModuleList`` whose members are all of one class that is called.

    A ``Sequential`` of one class counts too, if it holds nearly all parameters.

    Args:
        model: any module; without such a list the whole model counts as one block.
        name: take this ``ModuleList`` or ``Sequential`` instead, for instance ``"model.layers"``.
        holding: modules of which a list must hold one (others may belong to a frozen teacher, say); None asks for none.

    Raises:
        ValueError: if ``name`` is not the name of a list of modules.
    """
    lists = {clean_name(key): module for key, module in model.named_modules()}
    if name is not None:
        named = lists.get(name)
        if not isinstance(named, (nn.ModuleList, nn.Sequential)) or not len(named):
            known = [key for key, module in lists.items() if isinstance(module, nn.ModuleList) and len(module)]
            raise ValueError(
                f"blocks={name!r} is not a list of modules of {type(model).__name__}; "
                f"it has {', '.join(known) or 'none'}"
            )
        return _blocks(name, named)
    whole = sum(parameter.numel() for parameter in model.parameters())
    best, most = None, 0
    wanted = set(holding or ())
    for key, module in lists.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len({type(child) for child in module}) != 1:
            continue
        # Members without a forward of their own (lists of parts) are never called as such.
        called = all(getattr(child.forward, "__func__", None) is not nn.Module.forward for child in module)
        if not called or (holding is not None and not wanted.intersection(module.modules())):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        # A sequence may be one stage of several (ResNet): it counts where it is nearly all of the model.
        sequence = len(module) > 1 and size >= SEQUENCE_SHARE * whole
        if size > most and (isinstance(module, nn.ModuleList) or sequence):
            best, most = (key, module), size
    return Blocks(("",), (model,), whole=True) if best is None else _blocks(*best)


def _blocks(name: str, modules: nn.ModuleList | nn.Sequential) -> Blocks:
    # A block that stands in the list several times is one block.
    named = list(modules.named_children())
    prefix = f"{name}." if name else ""
    return Blocks(tuple(prefix + key for key, _ in named), tuple(module for _, module in named))


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` on a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def hidden_state(output: Any, block: str) -> Tensor:
    """Return the hidden state in a block's output: the output itself, or the first entry of a tuple.

    Raises:
        ValueError: for anything else.
    """
    first = first_tensor(output)
    if first is None:
        raise ValueError(
            f"block {block} returns {type(output).__name__}; its hidden state must be a tensor, or the first entry of "
            "a tuple"
        )
    return first
