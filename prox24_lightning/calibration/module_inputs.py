"""Calls of a module: recorded, made again, and followed to the calls of the modules inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import map_tensors, no_cache, tensors_in, with_value
from prox24_lightning.weights.sharded import is_sharded

_PLAIN = (bool, int, float, str, type(None), Tensor, nn.Parameter)
"""Themselves, no classes made of them: a checkpoint that holds such a class cannot be read without pickle's code."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, the autocast dtype it ran under (None: no autocast), and its number.

    ``autocast_cache`` says whether casts were to be kept: under another setting compiled code would be made anew.
    """

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None
    number: int = 0
    autocast_cache: bool = False

    @classmethod
    def record(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any], number: int = 0) -> Call:
        """The call that is being made now; key-value caches are left out, tensors are taken as they are."""
        kind = device_of(module).type
        return cls(
            tuple(no_cache(value) for value in args),
            {key: no_cache(value) for key, value in kwargs.items()},
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            number,
            torch.is_autocast_cache_enabled(),
        )

    def __call__(self, module: nn.Module) -> Any:
        """Make the call again."""
        kind = device_of(module).type
        enabled = self.autocast is not None
        # Copies: the module may change what it is called with in place.
        args, kwargs = map_tensors(torch.clone, (self.args, self.kwargs))
        with torch.autocast(kind, dtype=self.autocast, enabled=enabled, cache_enabled=self.autocast_cache):
            return module(*args, **kwargs)

    def place_of(self, tensor: Tensor | None) -> int | str | None:
        """Where ``tensor`` itself stands among the arguments: position or name; None if it does not."""
        if tensor is None:
            return None
        entries: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return next((place for place, value in entries if value is tensor), None)

    def with_value(self, place: int | str, value: Tensor | None) -> Call:
        """The same call with another argument at ``place``."""
        args, kwargs = with_value(self.args, self.kwargs, place, value)
        return replace(self, args=args, kwargs=kwargs)

    @property
    def plain(self) -> bool:
        """Whether a checkpoint can hold the arguments: tensors, numbers, text, and containers of them."""
        return _is_plain(self.args) and _is_plain(self.kwargs)

    def copied(self) -> Call:
        """The same with copies of all tensors, which later changes in place do not reach."""
        args, kwargs = map_tensors(lambda tensor: tensor.detach().clone(), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def state_dict(self) -> dict[str, Any]:
        autocast = {"autocast": str(self.autocast).removeprefix("torch."), "autocast_cache": self.autocast_cache}
        return {"args": list(self.args), "kwargs": self.kwargs, **autocast}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> Call:
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (tuple(state["args"]), state["kwargs"]))
        autocast = getattr(torch, state["autocast"], None)
        return cls(args, kwargs, autocast, autocast_cache=state["autocast_cache"])


@dataclass(frozen=True)
class Passage:
    """What one inner module is called with.

    Attributes:
        calls: one for each call of the site, if it is called once in each.
        place: where in each call the hidden state stands that the module before it in the list has handed on; it is
            left out of ``calls``. None: the calls are whole.
    """

    calls: list[Call]
    place: int | str | None = None


def reach(site: nn.Module, inners: Sequence[nn.Module], calls: Sequence[Call]) -> dict[nn.Module, Passage]:
    """The calls of ``inners`` that ``calls`` of ``site`` lead to, with the arguments as they are now, in one pass each.

    Args:
        inners: modules inside of ``site``, or ``site`` itself alone, in the order in which they run.

    Returns:
        by module: the first one, and those that take the hidden state from the one before them, as it was handed on,
        and nothing else that has come into being since the first one was called.
    """
    if list(inners) == [site]:
        return {site: Passage(list(calls))}
    found: dict[nn.Module, list[Call]] = {inner: [] for inner in inners}
    places: dict[nn.Module, set[int | str | None]] = {inner: set() for inner in inners}
    before = dict(zip(inners[1:], inners, strict=False))
    last: tuple[nn.Module | None, Tensor | None, int] = None, None, 0
    known: dict[int, tuple[Tensor, int]] = {}
    order: list[nn.Module] = []
    once = False

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal known
        call = Call.record(module, args, kwargs)
        before_it, hidden, version = last
        linked = before_it is before.get(module) and hidden is not None and hidden._version == version
        place = call.place_of(hidden) if linked else None
        given = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor is not hidden]
        if module is inners[0]:
            known = {id(tensor): (tensor, tensor._version) for tensor in given}
        elif any(id(tensor) not in known or known[id(tensor)][1] != tensor._version for tensor in given):
            place = None
        found[module].append(call if place is None else call.with_value(place, None))
        places[module].add(place)
        order.append(module)
        if once and module is inners[-1]:
            raise _Reached

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal last
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        last = (module, first, first._version) if isinstance(first, Tensor) else (module, None, 0)

    handles = [inner.register_forward_pre_hook(enter, with_kwargs=True) for inner in inners]
    handles += [inner.register_forward_hook(leave) for inner in inners[:-1]]
    try:
        for number, call in enumerate(calls):
            last = None, None, 0
            with suppress(_Reached):
                call(site)
            # The first pass runs to its end and shows whether later ones may stop early.
            once = once or (number == 0 and order == list(inners))
    finally:
        for handle in handles:
            handle.remove()
    linked = [inner for inner in inners[1:] if once and len(places[inner]) == 1 and None not in places[inner]]
    chain = {inner: Passage(found[inner], next(iter(places[inner]))) for inner in linked}
    return {inners[0]: Passage(found[inners[0]]), **chain}


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
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN and not (isinstance(value, Tensor) and is_sharded(value))
