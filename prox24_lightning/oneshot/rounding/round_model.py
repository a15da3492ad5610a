"""Round a 2:4 model to 8 bits so that it loses least: smooth inputs, round on the mask, keep some layers in 16 bits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.output_divergence import OutputDivergence
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.oneshot.prune import check_ordinary, prune_layerwise
from prox24_lightning.oneshot.pruning_report import LayerwiseReport
from prox24_lightning.oneshot.rounding.budget import (
    LossRise,
    RoundedLayers,
    RoundingBudget,
    rounding_prices,
    within_rise,
)
from prox24_lightning.oneshot.rounding.smooth_inputs import SmoothedInputs, smooth_inputs
from prox24_lightning.oneshot.rounding.tune import tune_rounded
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.tensors import to_device, without_inference
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import select_weights

logger = logging.getLogger(__name__)

PROBE_BATCHES = 2
"""Calibration batches on which the rise of the loss is measured."""


@dataclass(frozen=True)
class RoundingReport:
    """Result of :func:`round_model`.

    Attributes:
        form: of the rounded layers.
        smoothed: one entry an input; empty without ``smooth``.
        layers: the rounding of each layer.
        budget: which layers keep 16 bits and what that gives; None without ``max_loss_rise``.
        tuned: rise of the loss on the last batch before and after ``tune_steps``; None without them.
    """

    form: RoundedForm
    smoothed: tuple[SmoothedInputs, ...]
    layers: LayerwiseReport
    budget: RoundingBudget | None
    tuned: tuple[float, float] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers that keep 16 bits, for ``keep_16bit`` where the model is packed or converted."""
        return () if self.budget is None else self.budget.kept

    def __str__(self) -> str:
        """Say in a few lines what was done."""
        lines = []
        if self.smoothed:
            gains = [one for one in self.smoothed if one.before]
            ratios = [math.log(max(one.after or 0.0, 1e-30) / one.before) for one in gains if one.before]
            lost = f"{100 * (math.exp(sum(ratios) / len(ratios)) - 1):+.0f} %" if ratios else "nothing"
            lines.append(
                f"{len(gains)} of {len(self.smoothed)} inputs can be scaled freely; the loss of rounding a layer "
                f"changes by {lost} (geometric mean)"
            )
        if self.tuned is not None:
            before, after = (max(0.0, rise) for rise in self.tuned)  # sums of float32 may fall below
            lines.append(f"the loss rises by {before:.5f} nats with all layers in {self.form}, by {after:.5f} tuned")
        if self.budget is not None:
            found, whole = self.budget, sum(len(price.names) for price in self.budget.prices)
            lines.append(
                f"the loss rises by {found.rise_without:.5f} nats with all layers in {self.form}, by {found.rise:.5f} "
                f"with {len(found.kept)} of {whole} in 16 bits, which leaves {100 * found.gain_left:.0f} % of the gain"
            )
            lines.append(found.table())
        return "\n".join(lines)


@torch.inference_mode(False)
def round_model(
    model: nn.Module,
    batches: Iterable[Any],
    form: RoundedForm,
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    smooth: bool | None = None,
    tune_steps: int = 0,
    max_loss_rise: float | None = None,
    layer_times: LayerTimes | None = None,
    device: str | torch.device | None = None,
    offload: str = "device",
    progress: bool = True,
) -> RoundingReport:
    """Round the 2:4 weights of a model's blocks in place, as a packed file in ``form`` holds them.

    First, for int8, factors move outliers of the inputs into the weights, where that changes no output
    (:func:`~prox24_lightning.oneshot.rounding.smooth_inputs.smooth_inputs`). Then kept entries of a row make up for
    each other's errors (:func:`~prox24_lightning.oneshot.prune.prune_layerwise` with ``method="keep"``). With
    ``tune_steps`` the rounded weights of all layers then change together
    (:func:`~prox24_lightning.oneshot.rounding.tune.tune_rounded`). With ``max_loss_rise`` layers get their 16 bits
    back, the most expensive ones first, until the loss rises by no more.

    Args:
        model: 2:4 in what is to be rounded.
        batches: calibration batches: mappings (keyword arguments of the model), tuples or tensors.
        form: "fp8_e4m3" or "int8".
        targets, skip: patterns of names, see :func:`~prox24_lightning.weights.selection.select_weights`.
        smooth: scale inputs first; None does so for int8, where it gains most. float8 loses a little more with it than
            without, since its error is a share of each input whatever the scale.
        tune_steps: gradient steps that bring the model's predictions closest to those that it gave in 16 bits, each on
            one batch. Takes the whole model on ``device``, and 25 bytes for each rounded weight.
        max_loss_rise: largest rise of the loss, in nats (0.007 is 0.7 % of perplexity), measured on the first
            batches against the model in 16 bits: the divergence of its outputs beyond what the arithmetic of 16 bits
            makes (:class:`~prox24_lightning.oneshot.rounding.budget.LossRise`). None rounds every layer.
        layer_times: of each layer in 16 and in 8 bits, by name; None goes by multiply-adds.
        device: where blocks are rounded, and the whole model is with ``tune_steps`` and ``max_loss_rise``; None is
            where the model is.
        offload: see :func:`~prox24_lightning.oneshot.prune.prune_layerwise`.
        progress: show bars.

    Returns:
        what was done; ``kept`` names the layers that are not rounded.

    Raises:
        ValueError: for a bound that is not positive, steps that are no whole number, and as ``prune_layerwise``: a
            weight that is not 2:4, say.
    """
    if max_loss_rise is not None:
        check_loss_rise(max_loss_rise)
    if tune_steps:
        check_tune_steps(tune_steps)
        check_ordinary(model)
    batches = list(batches)
    chosen = select_weights(model, targets=targets, skip=skip).chosen
    layers = {weight.module_name: weight.module for weight in chosen if weight.parameter.dim() == 2}
    smoothed: list[SmoothedInputs] = []
    if smooth or (smooth is None and form == "int8"):
        smoothed = smooth_inputs(model, batches, form, layers, device=device, offload=offload, progress=progress)
    exact = {name: layer.get_parameter("weight").detach().cpu().clone() for name, layer in layers.items()}
    report = prune_layerwise(
        model,
        batches,
        method="keep",
        refine=None,
        weights=form,
        targets=targets,
        skip=skip,
        device=device,
        offload=offload,
        progress=progress,
    )
    done = {record.name.removesuffix(".weight") for record in report.layers}
    rounded = {name: layer for name, layer in layers.items() if name in done}
    tuned = budget = None
    home = next(model.parameters()).device
    if tune_steps or max_loss_rise is not None:
        model.to(home if device is None else device)
    try:
        if tune_steps:
            tuned = _tuned(model, batches, rounded, exact, form, tune_steps, progress)
        if max_loss_rise is not None:
            budget = _budget(model, batches[:PROBE_BATCHES], rounded, exact, form, max_loss_rise, layer_times, progress)
    finally:
        model.to(home)
    return RoundingReport(form, tuple(smoothed), report, budget, tuned)


def _tuned(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Mapping[str, nn.Module],
    exact: Mapping[str, Tensor],
    form: RoundedForm,
    steps: int,
    progress: bool,
) -> tuple[float, float] | None:
    """Change all rounded weights together; what keeps them from that is named in a warning."""
    moved = [without_inference(one) for one in _on_device(batches, model)]
    attempt = steps + 1  # with the look at what they gave
    with isolated(model), LayerProgress(1 + attempt, enabled=progress) as bar:
        bar.describe(text := f"steps at weights of {form}")
        begun = count(1)

        def step() -> None:
            if next(begun) > bar.total:  # they did not help: smaller ones follow
                bar.shrink(-attempt)
            bar.step(1, text)

        try:
            found = tune_rounded(model, moved, layers, exact, form, steps, step=step)
            if not math.isfinite(found[0]):
                raise ValueError(f"the predictions differ from those of 16 bits by {found[0]} nats")
            return found
        except Exception as error:  # of the user's forward under gradients
            logger.warning("tune_steps=%d is left out: %s", steps, describe(error))
            return None


def _on_device(batches: Sequence[Any], model: nn.Module) -> list[Any]:
    place = next(model.parameters()).device
    return [to_device(dict(one) if isinstance(one, Mapping) else one, place) for one in batches]


def _budget(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Mapping[str, nn.Module],
    exact: Mapping[str, Tensor],
    form: RoundedForm,
    max_rise: float,
    times: LayerTimes | None,
    progress: bool,
) -> RoundingBudget:
    """Measure where the model lies, and give the layers that are kept their weights back."""
    runs = [partial(call_model, model, one) for one in _on_device(batches, model)]
    switch = RoundedLayers(layers, exact, form)
    with isolated(model), LayerProgress(len(layers), enabled=progress) as bar:
        with switch.inputs_too(()):
            divergence = OutputDivergence(runs)
        rise = LossRise(switch, divergence)
        prices = rounding_prices(layers, rise, runs[0], times, step=bar.step)
        found = within_rise(prices, rise, max_rise)
        switch.round(set(layers) - set(found.kept))
    return found


def check_tune_steps(tune_steps: int) -> None:
    """Raise for a number of steps that cannot be.

    Raises:
        ValueError: if it is no whole number, or negative.
    """
    if isinstance(tune_steps, bool) or not isinstance(tune_steps, int) or tune_steps < 0:
        raise ValueError(f"tune_steps={tune_steps!r} must be a whole number, not negative; 0 leaves them out")


def check_loss_rise(max_loss_rise: float) -> None:
    """Raise for a bound that means nothing.

    Raises:
        ValueError: if it is not a positive number.
    """
    if not (isinstance(max_loss_rise, (int, float)) and 0 < max_loss_rise < math.inf):
        raise ValueError(f"max_loss_rise={max_loss_rise!r} must be positive: 0.007 for 0.7 % of perplexity; or None")
