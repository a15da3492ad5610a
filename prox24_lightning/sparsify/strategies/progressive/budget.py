"""Choose the layers that stay dense within a budget, on the recorded batches, before anything is solved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from torch import nn

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.model_loss import ModelLoss
from prox24_lightning.solvers.budget.choose import LayerPrice
from prox24_lightning.solvers.budget.price import LayerTimes, prices_of_groups
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.errors import described, on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns, BlockRun
from prox24_lightning.utils.distributed import gathered_objects, rank
from prox24_lightning.weights.layer_matrix import why_not_solvable

log = logging.getLogger(__name__)

_PROBES = 2
"""Recorded calls on which the loss is measured once a layer."""


def layer_prices(
    model: nn.Module,
    hooked: HookedModule,
    neighbours: Sequence[Sequence[Block]],
    calls: Sequence[ModuleCall],
    times: LayerTimes,
) -> list[LayerPrice]:
    """Return the prices of the layers of blocks, by the loss that the hooked module returns, or its output's error.

    Args:
        model: what holds the hooked module.
        hooked: is rerunning.
        neighbours: its blocks, in the order in which they run; those that share reruns of the recorded batches.
        calls: of the hooked module.
        times: of all layers.

    Raises:
        RerunError: if the model cannot be called again.
    """
    whole = [BlockRun(model, call, hooked.module) for call in calls[-_PROBES:]]
    loss: ModelLoss | None = None
    problem = None
    try:
        loss = ModelLoss(whole, [run.call.kwargs.get("input_ids") for run in whole])
        loss()
    except Exception as error:  # of the user's forward
        problem = described(error)
    if (problem := next((found for found in gathered_objects(problem) if found), None)) is not None:
        loss = None
        if rank() == 0:
            log.warning("the budget goes by each layer's own loss, since the model's cannot be measured: %s", problem)
    prices: list[LayerPrice] = []
    for together in neighbours:
        reruns = on_all_ranks(partial(BlockReruns, model, hooked, together, calls))
        for block in together:
            runs = on_all_ranks(partial(reruns.runs_of, block))
            if not all(gathered_objects(bool(runs))):
                continue
            weights = {
                weight.module: weight
                for weight in block.weights
                if not weight.is_experts and why_not_solvable(weight.module, weight.parameter_name) is None
            }
            groups = on_all_ranks(partial(find_input_groups, list(weights), runs[0]))
            prices += prices_of_groups(groups, weights, runs, times, loss, attempt=on_all_ranks)
            on_all_ranks(partial(reruns.pass_on, block, runs, None))
    return prices
