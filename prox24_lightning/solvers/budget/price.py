"""The price of layers: the model's loss with one of them alone 2:4, and the time that 2:4 saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.solvers.budget.choose import LayerPrice
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.input_group import Run, input_group_hessian
from prox24_lightning.solvers.layer import Solution, solve
from prox24_lightning.utils.distributed import from_first, gathered_objects
from prox24_lightning.weights.layer_matrix import as_matrix, from_matrix
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part, part_of, whole

SENSITIVITY = SolverConfig("wanda", refine_steps=50)

LayerTimes = Mapping[str, tuple[float, float]]
"""Name of a weight -> time of its product, dense and 2:4, in one unit."""

Attempt = Callable[[Callable[[], HessianAccumulator]], HessianAccumulator]
"""Makes the runs of this rank, see :func:`~prox24_lightning.solvers.input_group.input_group_hessian`."""


def times_or_products(weights: Sequence[GroupedWeight], times: LayerTimes | None) -> LayerTimes:
    """Return ``times``, or multiply-adds of all ``weights`` where it lacks one."""
    if times is not None and all(weight.name in times for weight in weights):
        return times
    sizes = {weight.name: float(weight.parameter.numel()) for weight in weights}
    return {name: (size, size / 2) for name, size in sizes.items()}


def prices_of_groups(
    groups: Sequence[InputGroup],
    weights: Mapping[nn.Module, GroupedWeight],
    runs: Sequence[Run],
    times: LayerTimes,
    loss: Callable[[], float] | None,
    *,
    describe: Callable[[str], None] = lambda text: None,
    attempt: Attempt | None = None,
) -> list[LayerPrice]:
    """Return the prices of the layers of a block, by Wanda's mask with refined values; none of what cannot be solved.

    Args:
        groups: the layers.
        weights: layer -> its weight; as before afterwards.
        runs: each calls the block on one calibration batch.
        times: of the layers.
        loss: of the whole model as it is when called; None takes each layer's own loss.
        describe: called with the name of each layer, before it is measured.
        attempt: see :func:`~prox24_lightning.solvers.input_group.input_group_hessian`.
    """
    prices = []
    dense_loss = None if loss is None else loss()
    for group in groups:
        hessian = input_group_hessian(group, runs, attempt=attempt).hessian
        for layer in group.layers:
            weight = weights[layer]
            describe(f"price of {weight.module_name}")
            try:
                solution = _solved(weight, hessian)
            except ValueError:  # inputs that are not finite; pruning raises this error with the layer's name
                continue
            rise = local = solution.refined_loss or 0.0
            if loss is not None and dense_loss is not None:
                rise = _with(weight, solution.weight, loss) - dense_loss
            prices.append(LayerPrice(weight.name, rise, local, *times[weight.name]))
    return prices


@torch.no_grad()
def solve_in_turn(
    groups: Sequence[InputGroup],
    weights: Mapping[nn.Module, GroupedWeight],
    runs: Sequence[Run],
    *,
    describe: Callable[[str], None] = lambda text: None,
    attempt: Attempt | None = None,
) -> None:
    """Make the layers of a block 2:4 as :func:`prices_of_groups` does, each on the inputs that those before it leave.

    The arguments are those of that function; ``weights`` hold the result afterwards.
    """
    for group in groups:
        hessian = input_group_hessian(group, runs, attempt=attempt).hessian
        for layer in group.layers:
            weight = weights[layer]
            describe(f"2:4 form of {weight.module_name}")
            solution = _solved(weight, hessian)
            _write(weight, solution.weight)


def mean_prices(prices: Sequence[LayerPrice]) -> list[LayerPrice]:
    """Return the prices with losses averaged over the ranks, the same on all of them."""
    shares = gathered_objects([price.loss for price in prices])
    means = [sum(values) / len(shares) for values in zip(*shares, strict=True)]
    return from_first([replace(price, loss=mean) for price, mean in zip(prices, means, strict=True)])


def reason(price: LayerPrice) -> str:
    """Return why a layer stays dense within a budget."""
    return f"budget: 2:4 of this layer alone would raise the loss by {price.loss:.4f}"


def _solved(weight: GroupedWeight, hessian: Tensor) -> Solution:
    matrix = as_matrix(weight.module, whole(local_part(weight.parameter), weight.parameter))
    return solve(matrix, hessian, SENSITIVITY, dim=weight.matrix_dim, name=weight.module_name)


@torch.no_grad()
def _write(weight: GroupedWeight, matrix: Tensor) -> None:
    values = from_matrix(weight.module, matrix)
    local_part(weight.parameter).copy_(part_of(values, weight.parameter))


@torch.no_grad()
def _with(weight: GroupedWeight, matrix: Tensor, loss: Callable[[], float]) -> float:
    """Return the loss with other values in a weight."""
    part = local_part(weight.parameter)
    dense = part.detach().clone()
    try:
        _write(weight, matrix)
        return loss()
    finally:
        part.copy_(dense)
