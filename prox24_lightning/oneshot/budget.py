"""Spend a budget of the speed-up on the layers that 2:4 hurts most for the time that it saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.model_loss import ModelLoss
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense
from prox24_lightning.solvers.budget.price import LayerTimes, mean_prices, prices_of_groups, reason, times_or_products
from prox24_lightning.utils.tensors import to_device
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight

log = logging.getLogger(__name__)

PROBE_BATCHES = 2
"""Calibration batches on which the loss is measured once a layer."""


def layer_prices(
    model: nn.Module,
    inputs: BlockInputs,
    batches: Sequence[Any],
    chosen: Sequence[GroupedWeight],
    bar: LayerProgress,
    times: LayerTimes | None = None,
) -> list[LayerPrice]:
    """Return the price of each of ``chosen`` that is no set of experts, the same on all ranks.

    Where the model does not lie on the device as a whole, its own loss cannot be measured: each layer's own loss takes
    its place.

    Args:
        model: of the blocks; as before afterwards.
        inputs: of the first block, where they stay.
        batches: of this run; those that the loss is measured on are the first ones.
        times: of the layers; None, or where one is missing: by multiply-adds.
    """
    layers = [weight for weight in chosen if not weight.is_experts]
    times = times_or_products(layers, times)
    loss = _model_loss(model, inputs, batches)
    prices: list[LayerPrice] = []
    with inputs.copied() as own:
        for index in range(len(own.blocks)):
            inside = {weight.module: weight for weight in layers if own.blocks.owns(index, weight.module_name)}
            with own.on_device(index) as block:
                runs = own.runs(index, block)
                groups = find_input_groups(list(inside), runs[0])
                check_same_input_groups(groups, {layer: weight.name for layer, weight in inside.items()})
                prices += prices_of_groups(groups, inside, runs, times, loss, describe=bar.describe)
                own.advance(index, block)
    return mean_prices(prices)


def within_budget(
    prices: Sequence[LayerPrice], chosen: Sequence[GroupedWeight], budget: float
) -> tuple[list[GroupedWeight], list[SkippedWeight]]:
    """Split ``chosen`` into what is pruned and what stays dense within ``budget``; experts never stay dense."""
    dense, found = choose_dense(prices, budget), {price.name: price for price in prices}
    skipped = [
        SkippedWeight(w.name, type(w.module).__name__, tuple(w.parameter.shape), reason(found[w.name]))
        for w in chosen
        if w.name in dense
    ]
    return [weight for weight in chosen if weight.name not in dense], skipped


def _model_loss(model: nn.Module, inputs: BlockInputs, batches: Sequence[Any]) -> ModelLoss | None:
    problem = f"the model lies on {inputs.home}, and blocks are solved on {inputs.device}"
    if inputs.home == inputs.device:
        plain = [dict(one) if isinstance(one, Mapping) else one for one in batches[:PROBE_BATCHES]]
        moved = [to_device(one, inputs.home) for one in plain]
        runs = [partial(_call, model, one) for one in moved]
        try:
            loss = ModelLoss(runs, [one.get("input_ids") if isinstance(one, dict) else None for one in moved])
            loss()
            return loss
        except Exception as error:  # of the user's forward
            problem = f"{type(error).__name__}: {error}"
    log.warning("the budget goes by each layer's own loss, since the model's cannot be measured: %s", problem)
    return None


def _call(model: nn.Module, batch: Any) -> Any:
    return call_model(model, to_device(batch, next(model.parameters()).device, copy=True))
