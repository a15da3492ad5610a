"""Choose the orders of inputs that are free, before anything is solved, on the recorded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from torch import nn

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.solvers.input_group import Run
from prox24_lightning.solvers.input_order.choose import ChosenOrder, choose_order, holders, proved_orders
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.errors import on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns, BlockRun
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.weights.selection import GroupedWeight

log = logging.getLogger(__name__)


def choose_orders(
    model: nn.Module, hooked: HookedModule, blocks: Sequence[Block], calls: Sequence[ModuleCall]
) -> list[ChosenOrder]:
    """Return better orders of inputs inside of blocks; where a model has no blocks, inside all of the hooked module.

    Args:
        model: what holds the hooked module.
        hooked: is rerunning.
        blocks: of the hooked module, in the order in which they run; one rerun of the recorded batches serves all.
        calls: of the hooked module.

    Raises:
        RerunError: if the model cannot be called again.
    """
    shared = holders(model)
    found: list[ChosenOrder] = []
    own = [block for block in blocks if all(weight.module is not block.module for weight in block.weights)]
    if own:
        reruns = on_all_ranks(partial(BlockReruns, model, hooked, own, calls))
        for block in own:
            runs = on_all_ranks(partial(reruns.runs_of, block))
            found += _chosen(block.module, runs, block.weights, shared)
            if runs:
                on_all_ranks(partial(reruns.pass_on, block, runs, None))
    if layers := [weight for block in blocks if block not in own for weight in block.weights]:
        whole = [BlockRun(model, call, hooked.module) for call in calls]
        found += _chosen(hooked.module, whole, layers, shared)
    return found


def _chosen(
    region: nn.Module, runs: Sequence[Run], weights: Sequence[GroupedWeight], shared: dict
) -> list[ChosenOrder]:
    if not all(gathered_objects(bool(runs))):
        return []
    free, reasons = proved_orders(region, runs[0], weights, shared)
    names = {weight.module: weight.module_name for weight in weights}
    for layer, reason in reasons.items():
        log.info("the order of the inputs of %s is fixed: %s", names[layer], reason)
    layers = {weight.module: weight for weight in weights if not weight.is_experts}
    chosen = []
    for order in free:
        try:
            one = choose_order(order, layers, runs, attempt=on_all_ranks)
        except ValueError as error:  # inputs that are not finite
            log.warning("%s; the order of its inputs stays as it is", error)
            continue
        if one is not None:
            chosen.append(one)
            log.info("%s: %s", names[next(layer for layer in order.consumers if layer in names)], one.note)
    return chosen
