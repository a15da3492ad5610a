"""Measure fixed scales for the inputs of layers of 8 bits, in place of one for every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from prox24_lightning.weights.rounding import LARGEST, RoundedForm


@torch.no_grad()
def measure_input_scales(
    layers: Mapping[str, nn.Module],
    runs: Iterable[Callable[[], object]],
    form: RoundedForm,
    *,
    quantile: float = 1.0,
) -> dict[str, float]:
    """Return a fixed scale for the inputs of each layer, from what it is called with in ``runs``.

    A fixed scale saves the pass that looks for each token's largest input; what exceeds it is clamped, and small tokens
    are rounded coarsely. For :func:`~prox24_lightning.convert.convert.convert_model`.

    Args:
        layers: linear layers by name, dense.
        runs: each calls the model that holds them on one calibration batch.
        form: that inputs are rounded to.
        quantile: in (0, 1], of the largest magnitudes of the tokens: 1 is the largest of all. It is the smallest
            magnitude that this share of the tokens does not exceed.

    Returns:
        Layer name -> scale. Layers that were not called, or with nothing above the smallest scale of float32, have
        none: their tokens keep scales of their own.

    Raises:
        ValueError: for a quantile out of range, no runs, and inputs that are not finite, by the layer's name.
    """
    check_input_quantile(quantile)
    found: dict[str, list[Tensor]] = {}

    def listener(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = (args[0] if args else next(iter(kwargs.values()))).detach()
            tokens = inputs.reshape(-1, inputs.shape[-1]) if inputs.numel() else inputs.new_zeros(0, 1)
            most = tokens.abs().amax(-1).float() if tokens.numel() else tokens.new_zeros(0, dtype=torch.float32)
            found.setdefault(name, []).append(most if quantile < 1 or not len(most) else most.amax().unsqueeze(0))

        return note

    handles = [layer.register_forward_pre_hook(listener(name), with_kwargs=True) for name, layer in layers.items()]
    calls = 0
    try:
        for run in runs:
            run()
            calls += 1
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError("fixed scales of the inputs take calibration data, and there is none: give a batch at least")
    scales = {}
    for name, parts in found.items():
        magnitudes = torch.cat(parts)
        if not torch.isfinite(magnitudes).all():
            raise ValueError(f"{name} was called with inputs that are not finite: its inputs have no fixed scale")
        if not len(magnitudes):
            continue
        scale = magnitudes.kthvalue(max(1, math.ceil(quantile * len(magnitudes)))).values / LARGEST[form]
        if scale > 0:
            scales[name] = float(scale)
    return scales


def check_input_quantile(quantile: float) -> None:
    """Raise for a quantile that gives no scale.

    Raises:
        ValueError: if it is not a number in (0, 1].
    """
    if not (isinstance(quantile, (int, float)) and 0 < quantile <= 1):
        raise ValueError(f"input_quantile={quantile!r} must lie in (0, 1]; 1 takes the largest input of all")
