"""Which layers of a block share an input, in what order the block calls them, and what that input is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.weights.sharded import local_part


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that share an input, and so a Hessian.

    ``once``: they are called once a forward pass, so a rerun may stop there.
    """

    layers: tuple[nn.Module, ...]
    once: bool


def find_input_groups(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[InputGroup]:
    """Call ``run`` and return the input groups of ``layers``, in the order of their first calls.

    Linear layers that get the very same tensor form one group. A layer that is not called is in none.
    """
    groups: list[list[nn.Module]] = []
    # The tensors are held, so that no address is used twice while the pass runs.
    inputs: list[tuple[Tensor, int]] = []
    calls: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        if calls[layer] > 1:
            return
        x = local_part(layer_input(args, kwargs))
        for group, (known, version) in zip(groups, inputs, strict=True):
            # Every empty tensor has the address 0.
            same = x.numel() > 0 and known.data_ptr() == x.data_ptr()
            same = same and known.shape == x.shape and known.stride() == x.stride()
            linear = isinstance(layer, nn.Linear) and isinstance(group[0], nn.Linear)
            if same and linear and version == x._version:
                group.append(layer)
                return
        groups.append([layer])
        inputs.append((x, x._version))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [InputGroup(tuple(group), all(calls[layer] == 1 for layer in group)) for group in groups]


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a linear or convolution layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


class _InputSeen(Exception):  # noqa: N818 (it ends a pass early, and is no error)
    pass


@torch.no_grad()
def record_inputs(layer: nn.Module, run: Callable[[], Any], *, once: bool) -> list[Tensor]:
    """Call ``run`` and return what ``layer`` was called with; ``once`` stops the pass there."""
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
