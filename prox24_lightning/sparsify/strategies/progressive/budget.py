"""Choose the layers that stay dense within a budget, on the recorded batches, before anything is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.model_loss import ModelLoss
from prox24_lightning.solvers.budget.measure import (
    BudgetChoices,
    ModelLosses,
    Visit,
    choose_layers,
    split_batches,
    usable,
    warn_of_own_losses,
)
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.errors import described, direct, on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns, BlockRun
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.layer_matrix import why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded


def choose_dense_layers(
    model: nn.Module,
    hooked: HookedModule,
    neighbours: Sequence[Sequence[Block]],
    calls: Sequence[ModuleCall],
    budgets: Sequence[float],
    times: LayerTimes,
) -> BudgetChoices:
    """Return the prices of the layers of blocks and what stays dense, by the loss that the hooked module returns.

    Where it returns none, the error of its output counts.

    Args:
        model: what holds the hooked module.
        hooked: is rerunning.
        neighbours: its blocks, in the order in which they run; those that share reruns of the recorded batches.
        calls: of the hooked module.
        budgets: shares of the gain given back.
        times: of all layers.

    Raises:
        RerunError: if the model cannot be called again.
    """
    weights = [weight for together in neighbours for block in together for weight in _priced(block).values()]
    losses = _losses(model, hooked, calls)
    each_block = partial(_each_block, model, hooked, neighbours, calls)
    return choose_layers(weights, each_block, budgets, times, losses, step=between_pieces, attempt=_attempt(weights))


def _losses(model: nn.Module, hooked: HookedModule, calls: Sequence[ModuleCall]) -> ModelLosses | None:
    # The last calls saw the latest weights: they give the prices.
    runs = [BlockRun(model, call, hooked.module) for call in reversed(calls)]
    losses: ModelLosses | None = None
    problem = None
    try:
        losses = ModelLosses(*(_loss(runs[part]) for part in split_batches(len(runs))))
    except Exception as error:  # of the user's forward
        problem = described(error)
    if (problem := next((found for found in gathered_objects(problem) if found), None)) is not None:
        losses = None
        warn_of_own_losses(problem)
    return losses


def _loss(runs: Sequence[BlockRun]) -> Callable[[], float]:
    return usable(ModelLoss(runs, [run.call.kwargs.get("input_ids") for run in runs]))


def _each_block(
    model: nn.Module,
    hooked: HookedModule,
    neighbours: Sequence[Sequence[Block]],
    calls: Sequence[ModuleCall],
    visit: Visit,
) -> None:
    attempt = _attempt([weight for together in neighbours for block in together for weight in block.weights])
    for together in neighbours:
        reruns = attempt(partial(BlockReruns, model, hooked, together, calls))
        for block in together:
            runs = attempt(partial(reruns.runs_of, block))
            if not all(gathered_objects(bool(runs))):
                continue
            weights = _priced(block)
            groups = attempt(partial(find_input_groups, list(weights), runs[0]))
            visit(groups, weights, runs)
            attempt(partial(reruns.pass_on, block, runs, None))


def _attempt(weights: Sequence[GroupedWeight]) -> Callable[[Callable[[], Any]], Any]:
    return direct if any(is_sharded(weight.parameter) for weight in weights) else on_all_ranks


def _priced(block: Block) -> Mapping[nn.Module, GroupedWeight]:
    return {
        weight.module: weight
        for weight in block.weights
        if not weight.is_experts and why_not_solvable(weight.module, weight.parameter_name) is None
    }
