"""Copies of modules, to measure or as a dense reference: evaluation mode, no gradients, hooks or compilation."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TABLES = ("inv_freq", "embed_positions")
_COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def bare_copy(
    module: nn.Module,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    shared: Sequence[object] = (),
) -> nn.Module:
    """Copy ``module`` in evaluation mode, its tensors going straight to ``device`` and ``dtype``.

    Tied weights stay tied. Hooks stay behind: a hook of a callback would drag the callback, its trainer and the
    optimizer states into the copy. Compiled modules are copied as the modules they were made from.

    Args:
        module: unchanged afterwards.
        device: where the copy lives; None leaves each tensor on its device.
        dtype: of its floating-point parameters and buffers, but for :func:`float32_tables`; None keeps them.
        shared: objects that the module may hold and the copy is to hold too, instead of copies of them.

    Raises:
        ValueError: if a parameter is sharded over ranks, or a module inside cannot be copied.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "placements"):
            raise ValueError(f"{name} is sharded over ranks and cannot be copied by one of them: gather the model")
        memo[id(parameter)] = nn.Parameter(_cast(parameter.detach(), device, dtype, copy=True), requires_grad=False)
    tables = {id(held[name]) for held, name in float32_tables(module)}
    for buffer in module.buffers():
        memo[id(buffer)] = _cast(buffer.detach(), device, None if id(buffer) in tables else dtype, copy=True)
    for each in module.modules():
        for value in vars(each).values():
            # An activation or a loss that a forward pass has left behind.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = _cast(value.detach(), device, dtype, copy=True)
    with _bare(module) as original:
        found = copy.deepcopy(original, memo)
    if shared_parts := set(map(id, module.modules())) & set(map(id, found.modules())):
        kind = next(type(each).__name__ for each in module.modules() if id(each) in shared_parts)
        raise ValueError(
            f"{type(module).__name__} cannot be copied: the copy would hold the same {kind} (its __deepcopy__ returns "
            "the module itself)"
        )
    return found.eval()


def frozen_copy(module: nn.Module, *, device: torch.device | None = None, shared: Sequence[object] = ()) -> nn.Module:
    """Return a copy of ``module`` that never changes: evaluation mode, no gradients, hooks, compilation or caches.

    Args:
        module: unchanged afterwards.
        device: where the copy lives; None copies each tensor where it lies.
        shared: objects that ``module`` may hold and that are not to be copied (a trainer, say).

    Raises:
        ValueError: if a parameter has no values yet, or is sharded over ranks.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name} has no values yet, so there is nothing to copy; load or initialise it first")
    copy = bare_copy(module, device=device, shared=shared)
    for part in copy.modules():
        # A forward set on the instance (compiled, say) is a function over the original, and would run the student.
        own = vars(part).get("forward")
        if own is not None and getattr(own, "__self__", None) is not part:
            del part.__dict__["forward"]
    config: Any = getattr(copy, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # Hugging Face's keys and values for later tokens; none follow
    return copy


def cast_model(module: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Move and cast ``module``, as ``module.to(device, dtype)`` does in place, but for :func:`float32_tables`."""
    tables = [(held, name, held[name]) for held, name in float32_tables(module)]
    module.to(device=device, dtype=dtype)
    for held, name, table in tables:
        held[name] = table.to(device=device)
    return module


def float32_tables(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield dictionary and key of the buffers that models of transformers keep in float32 whatever their weights are.

    Rotary frequencies and GPT-J's table of positions: rounded to 16 bits, they would turn late positions wrongly.
    """
    for each in module.modules():
        if type(each).__module__.partition(".")[0] in ("transformers", "transformers_modules"):
            for name in each._non_persistent_buffers_set:
                table = each._buffers.get(name)
                if table is not None and table.dtype == torch.float32 and name.endswith(_TABLES):
                    yield each._buffers, name


def move_inputs(inputs: Any, *, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move nested inputs to ``device``, floating-point tensors to ``dtype``; other objects by their ``.to``, if any."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _cast(leaf.detach(), device, dtype, copy=False)
        return leaf.to(device) if hasattr(leaf, "to") and not isinstance(leaf, nn.Module) else leaf

    return tree_map(move, inputs)


def _cast(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None, *, copy: bool) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=copy)


@contextmanager
def _bare(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module without hooks and compilation, which come back when the context ends."""
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def replace(holder: dict[str, Any], key: str, value: Any) -> None:
        undo.append((holder, key, holder[key]))
        holder[key] = value

    try:
        for each in list(module.modules()):
            state = vars(each)
            for attribute in _HOOK_ATTRIBUTES:
                if state.get(attribute):
                    replace(state, attribute, OrderedDict())
            if state.get("_compiled_call_impl") is not None:
                replace(state, "_compiled_call_impl", None)
            if state.get("_compiler_ctx"):  # a LightningModule that was given to the Trainer as torch.compile(module)
                for step in _COMPILED_STEPS:
                    if step in state:
                        undo.append((state, step, state.pop(step)))
                replace(state, "_compiler_ctx", None)
            for key, child in each._modules.items():
                if child is not None and hasattr(child, "_orig_mod"):
                    replace(each._modules, key, child._orig_mod)
        root = getattr(module, "_orig_mod", module)
        yield root
    finally:
        for holder, key, value in reversed(undo):
            holder[key] = value
