"""Refine rounded weights of all layers together, so that the model predicts what it did before it was rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.calibration.output_divergence import divergence, predictions
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.oneshot.reconstruct import rounding_of
from prox24_lightning.solvers.block_reconstruction import descend_together
from prox24_lightning.weights.rounding import RoundedForm

LEARNING_RATE = 1e-3
"""Largest step, relative to the rms of each weight: on SmolLM2-135M in float8 better than a third of it and than three
times as much."""


def tune_rounded(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Mapping[str, nn.Module],
    exact: Mapping[str, Tensor],
    form: RoundedForm,
    steps: int,
    *,
    learning_rate: float = LEARNING_RATE,
    step: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Lower the divergence of a rounded model's predictions from those of the same model in 16 bits.

    Layer by layer no rounding knows what the model makes of its errors, nor that inputs are rounded in every layer
    before and behind. Here the rounded weights of all layers change together, by gradients of the
    :func:`~prox24_lightning.calibration.output_divergence.divergence` with weights and inputs rounded (a
    straight-through estimate: arXiv 2305.17888 trains so without labels). Zeros stay, and nothing else changes. Each
    step takes one batch; the last of several batches is not trained on, and judges.

    Args:
        model: in 16 bits but for the weights of ``layers``, on the device where it runs, isolated from training. Takes
            its weights twice, and 21 bytes more for each that changes.
        batches: calibration batches on the same device.
        layers: by name, with rounded weights; those of linear layers.
        exact: their weights of 16 bits, by the same names.
        form: of the rounded ones.
        steps: how many.
        learning_rate: relative to the rms of each weight; where the divergence does not fall, smaller ones are tried.
        step: called after each step.

    Returns:
        the divergence before and after, in nats a token. Where it did not fall, the weights are as they were.
    """
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    device = next(iter(weights.values())).device
    before = {f"{name}.weight": exact[name].to(device) for name in layers}
    called = _Called(model)

    def error_of(batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = predictions(functional_call(called, {f"model.{k}": v for k, v in before.items()}, (batch,)))
        with rounded_inputs(layers.values(), form):
            found = divergence(wanted, call_model(model, batch))
        step()
        return found

    trained = batches[:-1] or batches
    return descend_together(
        model,
        {name: weight != 0 for name, weight in before.items()},
        error_of,
        [(batch,) for batch in trained],
        steps=steps,
        judged=[(batches[-1],)],
        trained=set(weights.values()),
        roundings={f"{name}.weight": rounding_of(layer, form) for name, layer in layers.items()},
        learning_rate=learning_rate,
        graphed=False,
    )


class _Called(nn.Module):
    """A model that takes a batch of any kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return call_model(self.model, batch)
