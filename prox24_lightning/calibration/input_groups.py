"""Which layers share an input, in what order they are called, and what that input is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.weights.sharded import local_part


@dataclass(frozen=True)
class InputGroup:
    """Layers that share an input, and so a Hessian.

    ``once``: they are called once a forward pass, so a rerun may stop there.
    """

    layers: tuple[nn.Module, ...]
    once: bool


class InputGroupFinder:
    """Sorts layers into input groups as they are called, in the order of their first calls.

    Linear layers that get the very same tensor form one group. A layer that is not called is in none.

    Args:
        hold: keep the inputs while the finder lives, so that no address is used twice. Else an input that is gone
            begins a group of its own when it comes again.
    """

    def __init__(self, *, hold: bool) -> None:
        self._hold = hold
        self._groups: list[list[nn.Module]] = []
        self._inputs: list[tuple[Callable[[], Tensor | None], int]] = []
        self._calls: dict[nn.Module, int] = {}

    def note(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take a call of a layer into account."""
        self._calls[layer] = self._calls.get(layer, 0) + 1
        if self._calls[layer] > 1:
            return
        given = layer_input(args, kwargs)
        for group, (reference, version) in zip(self._groups, self._inputs, strict=True):
            linear = isinstance(layer, nn.Linear) and isinstance(group[0], nn.Linear)
            known = reference()
            if linear and known is not None and known._version == version and _same_memory(known, given):
                group.append(layer)
                return
        self._groups.append([layer])
        self._inputs.append(((lambda: given) if self._hold else weakref.ref(given), given._version))

    @property
    def groups(self) -> list[InputGroup]:
        """The groups of the layers that have been called."""
        return [InputGroup(tuple(group), all(self._calls[layer] == 1 for layer in group)) for group in self._groups]


def find_input_groups(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[InputGroup]:
    """Call ``run`` and return the input groups of ``layers``; see :class:`InputGroupFinder`."""
    finder = InputGroupFinder(hold=True)
    handles = [layer.register_forward_pre_hook(finder.note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        remove_all(handles)
    return finder.groups


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a linear or convolution layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


class _InputSeen(Exception):  # noqa: N818 (it ends a rerun early, and is no error)
    pass


def record_inputs(layer: nn.Module, run: Callable[[], Any], *, once: bool) -> list[Tensor]:
    """Call ``run`` and return what ``layer`` was called with; ``once`` stops the rerun there."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs).detach()
        found.append(x if once else x.clone())  # what goes on may change it in place
        if once:
            raise _InputSeen

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with suppress(_InputSeen):
            run()
    finally:
        handle.remove()
    return found


def record_all_inputs(layers: Sequence[nn.Module], run: Callable[[], Any]) -> tuple[Any, dict[nn.Module, list[Tensor]]]:
    """Call ``run`` and return what it returns, and what each of ``layers`` was called with."""
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found[layer].append(layer_input(args, kwargs).detach().clone())  # what goes on may change it in place

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in found]
    try:
        return run(), found
    finally:
        remove_all(handles)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    one, other = local_part(one), local_part(other)
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    # Every empty tensor has the address 0.
    same = one.numel() > 0 and one.data_ptr() == other.data_ptr()
    return same and one.shape == other.shape and one.stride() == other.stride()
