"""In what order a block calls its layers, which of them share an input, and what that input is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.weights.sharded import local_part


@dataclass(frozen=True)
class Stage:
    """Layers of one block that see the same input, and so share their second moments.

    ``once`` says that they are called once a forward pass, so a pass may stop there.
    """

    layers: tuple[nn.Module, ...]
    once: bool


def order_of_calls(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[Stage]:
    """Call ``run`` and sort ``layers`` into stages, in the order of their first calls.

    Linear layers with the very same input tensor form one stage. A layer that is not called is in no stage.
    """
    stages: list[list[nn.Module]] = []
    # The tensors are held, so that no address is used twice while the pass runs.
    inputs: list[tuple[Tensor, int]] = []
    calls: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        if calls[layer] > 1:
            return
        x = local_part(layer_input(args, kwargs))
        for stage, (known, version) in zip(stages, inputs, strict=True):
            # Every empty tensor has the address 0.
            same = x.numel() > 0 and known.data_ptr() == x.data_ptr()
            same = same and known.shape == x.shape and known.stride() == x.stride()
            linear = isinstance(layer, nn.Linear) and isinstance(stage[0], nn.Linear)
            if same and linear and version == x._version:
                stage.append(layer)
                return
        stages.append([layer])
        inputs.append((x, x._version))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [Stage(tuple(stage), all(calls[layer] == 1 for layer in stage)) for stage in stages]


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a linear or convolution layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


class _StageDone(Exception):  # noqa: N818 (it ends a pass early, and is no error)
    pass


@torch.no_grad()
def inputs_of(layer: nn.Module, run: Callable[[], Any], *, once: bool) -> list[Tensor]:
    """Call ``run`` and return what ``layer`` was called with; ``once`` stops the pass there."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs).detach()
        found.append(x if once else x.clone())  # what goes on may change it in place
        if once:
            raise _StageDone

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with suppress(_StageDone):
            run()
    finally:
        handle.remove()
    return found
