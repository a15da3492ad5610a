"""Choose the layers that stay dense on a model: by prices of single layers, then by its loss with each choice."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense
from prox24_lightning.solvers.budget.portfolio import Choice, Loss, choose_by_loss, evaluations, marginal_prices
from prox24_lightning.solvers.budget.price import Attempt, LayerTimes, mean_prices, prices_of_groups, solve_in_turn
from prox24_lightning.solvers.budget.switch import SwitchedWeights
from prox24_lightning.solvers.input_group import Run
from prox24_lightning.utils.distributed import gathered_objects, rank
from prox24_lightning.utils.errors import describe
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

log = logging.getLogger(__name__)

PROBES = 2
"""Calibration batches that give the prices."""
JUDGES = 4
"""So many other ones at most decide between choices."""

Visit = Callable[[Sequence[InputGroup], Mapping[nn.Module, GroupedWeight], Sequence[Run]], None]
"""Called with the input groups of a block, the weights of its layers, and calls of it on the calibration batches."""


@dataclass(frozen=True)
class ModelLosses:
    """The loss of a model as it is when it is called, on batches of this rank.

    Attributes:
        probe: on the batches that give the prices.
        judge: on other batches, where there are enough.
    """

    probe: Callable[[], float]
    judge: Callable[[], float]


@dataclass(frozen=True)
class BudgetChoices:
    """Result of :func:`choose_layers`, the same on all ranks.

    Attributes:
        prices: of single layers in the dense model.
        choices: one for each budget.
    """

    prices: tuple[LayerPrice, ...]
    choices: tuple[Choice, ...]


def usable(loss: Callable[[], float]) -> Callable[[], float]:
    """Return ``loss``, which is called once to see that it can decide anything.

    Raises:
        ValueError: if it is not finite, as with labels that ignore all tokens.
    """
    if not math.isfinite(value := loss()):
        raise ValueError(f"its loss is {value}")
    return loss


def warn_of_own_losses(problem: str) -> None:
    """Say once that layers are chosen by their own losses, and why."""
    if rank() == 0:
        log.warning("the budget goes by each layer's own loss, since the model's cannot be measured: %s", problem)


def split_batches(count: int) -> tuple[slice, slice]:
    """Return which of ``count`` batches give the prices, and which decide: others, if there are more."""
    probes = slice(0, PROBES)
    return probes, slice(max(PROBES, count - JUDGES), count) if count > PROBES else probes


def most_steps(layers: int, budgets: Sequence[float], losses: ModelLosses | None) -> int:
    """Return how often :func:`choose_layers` calls ``step`` at most, for so many layers."""
    if losses is None or not any(budgets):
        return layers
    return 2 * layers + evaluations(layers, budgets)


def choose_layers(
    weights: Sequence[GroupedWeight],
    each_block: Callable[[Visit], None],
    budgets: Sequence[float],
    times: LayerTimes,
    losses: ModelLosses | None,
    *,
    step: Callable[[str], None] = lambda text: None,
    attempt: Attempt | None = None,
) -> BudgetChoices:
    """Return prices of all layers and the choice at each budget; the weights are as before afterwards.

    Without ``losses``, or where the model cannot be run with other weights in it, the knapsack with prices of single
    layers decides alone; where it cannot be run with one other layer, each layer's own loss is its price.

    Args:
        weights: of all layers, on the devices where the model runs.
        each_block: calls what it is given for one block after the other, on the inputs that reach each then.
        budgets: shares of the gain given back.
        times: of the layers.
        losses: of the model; None takes each layer's own loss as its price.
        step: called with the name of each measurement: of a layer, or of a choice.
        attempt: see :func:`~prox24_lightning.solvers.input_group.input_group_hessian`.
    """
    found: list[LayerPrice] = []
    probe = None if losses is None else partial(mean_on_all_ranks, losses.probe)
    try:
        each_block(
            lambda groups, inside, runs: found.extend(
                prices_of_groups(groups, inside, runs, times, probe, describe=step, attempt=attempt)
            )
        )
    except Exception as error:  # of the user's forward, with a layer that is 2:4
        if losses is None:
            raise
        warn_of_own_losses(describe(error))
        return choose_layers(weights, each_block, budgets, times, None, step=step, attempt=attempt)
    prices = mean_prices(found)
    by_prices = [Choice("prices of the dense model", choose_dense(prices, budget)) for budget in budgets]
    if losses is None or not prices or not any(budgets):
        return BudgetChoices(tuple(prices), tuple(by_prices))
    inside = [weight for weight in weights if any(price.name == weight.name for price in prices)]
    try:
        choices = _by_loss(inside, prices, each_block, budgets, losses, step, attempt)
    except Exception as error:  # of the user's forward, on weights that it has not seen
        if rank() == 0:
            log.warning(
                "the budget goes by prices of single layers, since the model cannot be measured with all of them 2:4: "
                "%s: %s",
                type(error).__name__,
                error,
            )
        choices = by_prices
    return BudgetChoices(tuple(prices), tuple(choices))


def _by_loss(
    weights: Sequence[GroupedWeight],
    prices: Sequence[LayerPrice],
    each_block: Callable[[Visit], None],
    budgets: Sequence[float],
    losses: ModelLosses,
    step: Callable[[str], None],
    attempt: Attempt | None,
) -> list[Choice]:
    parameters = {weight.name: local_part(weight.parameter).detach() for weight in weights}
    with _kept(parameters) as dense:
        each_block(lambda groups, inside, runs: solve_in_turn(groups, inside, runs, describe=step, attempt=attempt))
        solved = {name: parameter.to("cpu", copy=True) for name, parameter in parameters.items()}
        switch = SwitchedWeights(parameters, solved, dense)

        def loss_of(loss: Callable[[], float]) -> Loss:
            def measured(names: Collection[str]) -> float:
                switch.take_second(names)
                return mean_on_all_ranks(loss)

            return measured

        probe, judge = loss_of(losses.probe), loss_of(losses.judge)
        sparse_side = marginal_prices(prices, (), probe, step)
        return [choose_by_loss(prices, sparse_side, budget, probe, judge, describe=step) for budget in budgets]


def mean_on_all_ranks(loss: Callable[[], float]) -> float:
    """Return the mean of ``loss()`` over the ranks, infinity if it is not finite; all of them call this.

    Raises:
        RuntimeError: on every rank, if it fails on one.
    """
    value, problem = math.inf, None
    try:
        value = loss()
    except Exception as error:  # of the user's forward
        problem = f"{type(error).__name__}: {error}"
    found = gathered_objects((value, problem))
    if (first := next((text for _, text in found if text is not None), None)) is not None:
        raise RuntimeError(first)
    mean = sum(one for one, _ in found) / len(found)
    return mean if math.isfinite(mean) else math.inf


@contextmanager
def _kept(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the values of parameters, and give them back afterwards."""
    dense = {name: parameter.to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        yield dense
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(dense[name])
