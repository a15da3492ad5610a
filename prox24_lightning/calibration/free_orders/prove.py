"""Prove that an order or scale of inputs is free: outputs are equal, up to rounding, after a random change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.utils.tensors import tensors_in
from prox24_lightning.weights.free_order import FreeOrder
from prox24_lightning.weights.free_scale import FreeScale

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest relative difference of a feature's outputs, averaged over features, that rounding may make."""

_FEATURES = 4096
"""Compared at a time: the logits of a vocabulary are large."""

Change = TypeVar("Change", FreeOrder, FreeScale)


def proved(changes: Sequence[Change], run: Callable[[], Any]) -> tuple[list[Change], dict[nn.Module, str]]:
    """Return those of ``changes`` that leave the outputs as they are when drawn at random, and why the others do not.

    The outputs of the consumers and what ``run`` returns are compared. Weights are as before afterwards.
    """
    before = _outputs(changes, run)
    difference = _difference(changes, run, before)
    if difference is None:
        return list(changes), {}
    if len(changes) == 1:
        what = "order" if isinstance(changes[0], FreeOrder) else "scale"
        return [], dict.fromkeys(changes[0].consumers, f"another {what} of these inputs changes {difference}")
    parts = [proved([change], run) for change in changes]
    return [one for found, _ in parts for one in found], {k: v for _, reasons in parts for k, v in reasons.items()}


def why_not_proved(changes: Sequence[Change], run: Callable[[], Any]) -> str | None:
    """Return what random changes change in the outputs of ``run`` alone, beyond rounding; None if nothing.

    Of a whole model the outputs of all consumers may not fit into memory.
    """
    before = _outputs([], run)
    return _difference(changes, run, before, ()) if before else "nothing that can be compared: there is no output"


def _difference(
    changes: Sequence[Change],
    run: Callable[[], Any],
    before: Mapping[str, Tensor],
    watched: Sequence[Change] | None = None,
) -> str | None:
    """Return what random changes change beyond rounding; None if nothing. ``watched``: whose consumers' outputs are
    compared; None is all."""
    with ExitStack() as stack:
        for seed, change in enumerate(changes):
            stack.enter_context(change.tried(seed))
        after = _outputs(changes if watched is None else watched, run)
    for what, output in before.items():
        error = relative_difference(after[what], output)
        if not error <= TOLERANCES.get(output.dtype, 3e-2):
            return f"{what} by {error:.1e} of its rms"
    return None


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """Return the relative difference of each feature (the last dimension), averaged: features of a hundred times the
    others' size hide nothing."""
    if output.shape != reference.shape:
        return float("inf")
    if not output.numel():
        return 0.0
    features = output.shape[-1] if output.dim() else 1
    pairs = zip(*(one.reshape(-1, features).split(_FEATURES, 1) for one in (output, reference)), strict=True)
    return sum(float(_relative(*pair).sum()) for pair in pairs) / features


def _relative(output: Tensor, reference: Tensor) -> Tensor:
    """Return the relative difference of each column, (features,)."""
    output, reference = output.double(), reference.double()
    size = reference.square().mean(0).sqrt()
    difference = (output - reference).square().mean(0).sqrt()
    return torch.where(difference > 0, difference / size, 0.0)


def _outputs(changes: Sequence[Change], run: Callable[[], Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                found[key] = tensor.detach().clone()

        return hook

    # What one scale divides another may read: its own outputs change, and those of the layers behind it do not.
    divided = {part.module for change in changes if isinstance(change, FreeScale) for part in change.divided}
    consumers = [consumer for change in changes for consumer in change.consumers if consumer not in divided]
    handles = [
        consumer.register_forward_hook(note(f"the output of layer {number} behind them"))
        for number, consumer in enumerate(consumers)
    ]
    try:
        outputs = tensors_in(run())
    finally:
        remove_all(handles)
    floating = [tensor for tensor in outputs if tensor.is_floating_point()]
    return found | {f"output {number}": tensor.detach().clone() for number, tensor in enumerate(floating)}
