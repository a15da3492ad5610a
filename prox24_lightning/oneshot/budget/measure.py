"""Measure the price of every layer: the model's loss with this layer alone 2:4, and the time that 2:4 saves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.budget.choose import LayerPrice, choose_dense
from prox24_lightning.oneshot.budget.model_loss import ModelLoss
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.input_group import input_group_hessian
from prox24_lightning.solvers.layer import solve
from prox24_lightning.utils.distributed import from_first, gathered_objects
from prox24_lightning.weights.layer_matrix import as_matrix, from_matrix
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight

log = logging.getLogger(__name__)

PROBE_BATCHES = 2
"""Calibration batches on which the loss is measured once a layer."""
SENSITIVITY = SolverConfig("wanda", refine_steps=50)

LayerTimes = Mapping[str, tuple[float, float]]
"""Name of a weight -> time of its product, dense and 2:4, in one unit."""


def layer_prices(
    model: nn.Module,
    inputs: BlockInputs,
    batches: Sequence[Any],
    chosen: Sequence[GroupedWeight],
    bar: LayerProgress,
    times: LayerTimes | None = None,
) -> list[LayerPrice]:
    """Return the price of each of ``chosen`` that is no set of experts, the same on all ranks.

    A layer is pruned by Wanda's mask with refined values on the inputs of the dense model. Where the model does not
    lie on the device as a whole, its own loss cannot be measured: the local loss takes its place.

    Args:
        model: of the blocks; as before afterwards.
        inputs: of the first block, where they stay.
        batches: of this run; those that the loss is measured on are the first ones.
        times: of the layers; None, or where one is missing: by multiply-adds.
    """
    layers = [weight for weight in chosen if not weight.is_experts]
    if times is None or any(weight.name not in times for weight in layers):
        sizes = {weight.name: float(weight.parameter.numel()) for weight in layers}
        times = {name: (size, size / 2) for name, size in sizes.items()}
    loss = _model_loss(model, inputs, batches)
    dense_loss = None if loss is None else loss()
    prices: list[LayerPrice] = []
    with inputs.copied() as own:
        for index in range(len(own.blocks)):
            inside = {weight.module: weight for weight in layers if own.blocks.owns(index, weight.module_name)}
            with own.on_device(index) as block:
                runs = own.runs(index, block)
                groups = find_input_groups(list(inside), runs[0])
                check_same_input_groups(groups, {layer: weight.name for layer, weight in inside.items()})
                for group in groups:
                    hessian = input_group_hessian(group, runs).hessian
                    for layer in group.layers:
                        weight = inside[layer]
                        bar.describe(f"price of {weight.module_name}")
                        solution = solve(
                            as_matrix(layer), hessian, SENSITIVITY, dim=weight.matrix_dim, name=weight.module_name
                        )
                        local = solution.refined_loss or 0.0
                        rise = local
                        if loss is not None and dense_loss is not None:
                            rise = _with(weight, from_matrix(layer, solution.weight), loss) - dense_loss
                        prices.append(LayerPrice(weight.name, rise, local, *times[weight.name]))
                own.advance(index, block)
    shares = gathered_objects([price.loss for price in prices])
    means = [sum(values) / len(shares) for values in zip(*shares, strict=True)]
    return from_first(
        [
            LayerPrice(price.name, mean, price.local_loss, price.dense_time, price.sparse_time)
            for price, mean in zip(prices, means, strict=True)
        ]
    )


def within_budget(
    prices: Sequence[LayerPrice], chosen: Sequence[GroupedWeight], budget: float
) -> tuple[list[GroupedWeight], list[SkippedWeight]]:
    """Split ``chosen`` into what is pruned and what stays dense within ``budget``; experts never stay dense."""
    dense, found = choose_dense(prices, budget), {price.name: price for price in prices}
    skipped = [
        SkippedWeight(
            weight.name,
            type(weight.module).__name__,
            tuple(weight.parameter.shape),
            f"budget: 2:4 of this layer alone would raise the loss by {found[weight.name].loss:.4f}",
        )
        for weight in chosen
        if weight.name in dense
    ]
    return [weight for weight in chosen if weight.name not in dense], skipped


def _model_loss(model: nn.Module, inputs: BlockInputs, batches: Sequence[Any]) -> ModelLoss | None:
    problem = None
    if inputs.home != inputs.device:
        problem = f"the model lies on {inputs.home}, and blocks are solved on {inputs.device}"
    else:
        try:
            return ModelLoss(model, batches[:PROBE_BATCHES], inputs.home)
        except Exception as error:  # of the user's forward
            problem = f"{type(error).__name__}: {error}"
    log.warning("the budget goes by each layer's own loss, since the model's cannot be measured: %s", problem)
    return None


@torch.no_grad()
def _with(weight: GroupedWeight, values: torch.Tensor, loss: ModelLoss) -> float:
    """Return the loss with other values in a weight."""
    dense = weight.parameter.detach().clone()
    try:
        weight.parameter.copy_(values)
        return loss()
    finally:
        weight.parameter.copy_(dense)
