"""Find a model's repeated blocks, and call them with the arguments that the model passes.

Nothing about an architecture is written down here: the blocks are the largest list of like modules, and the
arguments (attention masks, position embeddings, flags) are whatever the model itself passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """``change`` applied to every tensor inside ``value`` (nested tuples, lists, dictionaries)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(change, item) for item in value)
    if type(value) is dict:
        return {key: map_tensors(change, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors inside ``value`` (nested tuples, lists, dictionaries), in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def to_device(value: Any, device: torch.device | str, *, copy: bool = False) -> Any:
    """Move every tensor inside ``value`` (nested tuples, lists, dictionaries) to ``device``; ``copy`` those there."""
    return map_tensors(lambda tensor: tensor.to(device, copy=copy), value)


@dataclass
class Call:
    """The arguments of one call of one block. The hidden state, which flows from block to block, is left out.

    Attributes:
        args, kwargs: as the model passed them, with None in the hidden state's place.
        place: position in ``args`` (int) or name in ``kwargs`` (str) of the hidden state.
    """

    args: tuple
    kwargs: dict[str, Any]
    place: int | str

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device | str) -> Any:
        """Call ``block`` with a copy of ``hidden`` in its place (it may work in place), everything on ``device``."""
        args, kwargs = to_device(self.args, device), to_device(self.kwargs, device)
        args, kwargs = with_value(args, kwargs, self.place, hidden.to(device, copy=True))
        return block(*args, **kwargs)


def with_value(args: tuple, kwargs: dict[str, Any], place: int | str, value: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another one at ``place``: position or name."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}


def hidden_of(output: Any, block: str) -> Tensor:
    """The hidden state in a block's output: the output itself, or the first entry of a tuple.

    Raises:
        ValueError: for anything else.
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(
            f"block {block} returns {type(output).__name__}; the layer-wise walk follows a tensor, or a tuple "
            "that begins with one"
        )
    return first


def split_call(args: tuple, kwargs: dict[str, Any], block: str) -> tuple[Call, Tensor]:
    """Separate the hidden state (the first floating tensor) from a block's other arguments; caches become None.

    Raises:
        ValueError: if no argument is a floating tensor.
    """
    args, kwargs = tuple(no_cache(value) for value in args), {k: no_cache(v) for k, v in kwargs.items()}
    entries: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    entries.sort(key=lambda entry: entry[0] != "hidden_states")
    for place, value in entries:
        if isinstance(value, Tensor) and value.is_floating_point():
            if isinstance(place, int):
                return Call((*args[:place], None, *args[place + 1 :]), kwargs, place), value
            return Call(args, {**kwargs, place: None}, place), value
    raise ValueError(f"block {block} is called without a floating tensor; name the right list of modules with blocks=")


def no_cache(value: Any) -> Any:
    """``value``, or None in the place of a key-value cache, which a second pass must not see."""
    # Known by what it does rather than by class, so that every release of transformers is covered.
    return None if hasattr(value, "get_seq_length") else value


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Turn key-value caches off through the model's own config, and dropout off; restore both."""
    config: Any = getattr(model, "config", None)
    old = getattr(config, "use_cache", None)
    training = {module: module.training for module in model.modules()}
    if old is not None:
        config.use_cache = False
    model.eval()
    try:
        yield
    finally:
        if old is not None:
            config.use_cache = old
        for module, flag in training.items():
            module.training = flag


@contextmanager
def listened_to(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no caches, no gradients, nothing compiled and no fast path of torch's encoder layers (which
    hands on nested tensors), so that inner modules can be listened to."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), caches_off(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
