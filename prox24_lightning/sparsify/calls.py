"""Calls of a module: recorded, made again, and followed to the calls of the modules inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.layerwise.blocks import map_tensors, no_cache
from prox24_lightning.sharding import is_sharded

_PLAIN = (bool, int, float, str, type(None), Tensor)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, the autocast dtype it ran under (None: no autocast), and its number."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None
    number: int = 0

    @classmethod
    def record(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any], number: int = 0) -> Call:
        """The call that is being made now; key-value caches are left out, tensors are taken as they are."""
        kind = device_of(module).type
        return cls(
            tuple(no_cache(value) for value in args),
            {key: no_cache(value) for key, value in kwargs.items()},
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            number,
        )

    def __call__(self, module: nn.Module) -> Any:
        """Make the call again."""
        kind = device_of(module).type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            return module(*self.args, **self.kwargs)

    @property
    def plain(self) -> bool:
        """Whether a checkpoint can hold the arguments: tensors, numbers, text, and containers of them."""
        return _is_plain(self.args) and _is_plain(self.kwargs)

    def copied(self) -> Call:
        """The same with copies of all tensors, which later changes in place do not reach."""
        args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), (self.args, self.kwargs))
        return Call(args, kwargs, self.autocast, self.number)

    def state_dict(self) -> dict[str, Any]:
        return {"args": list(self.args), "kwargs": self.kwargs, "autocast": str(self.autocast).removeprefix("torch.")}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Call:
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (tuple(state["args"]), state["kwargs"]))
        return cls(args, kwargs, getattr(torch, state["autocast"], None))


def reach(site: nn.Module, inner: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The calls of ``inner`` that ``calls`` of ``site`` lead to, with the arguments as they are now."""
    if site is inner:
        return list(calls)
    found: list[Call] = []
    once = False

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(Call.record(module, args, kwargs))
        if once:
            raise _Reached

    handle = inner.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for number, call in enumerate(calls):
            with suppress(_Reached):
                call(site)
            # The first pass runs to its end and shows whether later ones may stop early.
            once = once or (number == 0 and len(found) == 1)
    finally:
        handle.remove()
    return found


def order_of_first_calls(call: Call, site: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of ``modules`` that ``call`` of ``site`` reaches, in the order in which it does."""
    found: list[nn.Module] = []

    def note(module: nn.Module, args: tuple) -> None:
        if module not in found:
            found.append(module)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        call(site)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Reached(Exception):  # noqa: N818 (it ends a pass early, and is no error)
    pass


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lies; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not (isinstance(value, Tensor) and is_sharded(value))
