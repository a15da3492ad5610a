"""Prove that an order of inputs is free: outputs are equal, up to rounding, in a random order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.utils.tensors import tensors_in
from prox24_lightning.weights.free_order import FreeOrder, inverse_order

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest relative difference of a feature's outputs, averaged over features, that rounding may make."""


def proved(orders: Sequence[FreeOrder], run: Callable[[], Any]) -> tuple[list[FreeOrder], dict[nn.Module, str]]:
    """Return those of ``orders`` in which random orders leave the outputs as they are, and why the others are fixed.

    The outputs of the consumers and what ``run`` returns are compared. Weights are as before afterwards.
    """
    before = _outputs(orders, run)
    difference = _difference(orders, run, before)
    if difference is None:
        return list(orders), {}
    if len(orders) == 1:
        return [], dict.fromkeys(orders[0].consumers, f"another order of these inputs changes {difference}")
    parts = [proved([order], run) for order in orders]
    return [order for found, _ in parts for order in found], {k: v for _, reasons in parts for k, v in reasons.items()}


def _difference(orders: Sequence[FreeOrder], run: Callable[[], Any], before: Mapping[str, Tensor]) -> str | None:
    """Return what random orders change beyond rounding; None if nothing."""
    drawn = [order.random_order(seed) for seed, order in enumerate(orders)]
    moved = 0
    try:
        for order, places in zip(orders, drawn, strict=True):
            moved += 1
            order.move(places)
        after = _outputs(orders, run)
    finally:
        for order, places in zip(orders[:moved], drawn[:moved], strict=True):
            order.move(inverse_order(places))
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
    rows = output.double().reshape(-1, output.shape[-1]), reference.double().reshape(-1, output.shape[-1])
    size = rows[1].square().mean(0).sqrt()
    difference = (rows[0] - rows[1]).square().mean(0).sqrt()
    return float(torch.where(difference > 0, difference / size, 0.0).mean())


def _outputs(orders: Sequence[FreeOrder], run: Callable[[], Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                found[key] = tensor.detach().clone()

        return hook

    consumers = [consumer for order in orders for consumer in order.consumers]
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
