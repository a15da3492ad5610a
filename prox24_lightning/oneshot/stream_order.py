"""The order of the residual stream in a one-shot run: found, proved and chosen on the dense model's inputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.calibration.free_orders.stream import find_stream_order
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.input_group import input_group_hessian
from prox24_lightning.solvers.input_order.choose import ChosenOrder, why_fixed
from prox24_lightning.solvers.input_order.stream import StreamOrderSearch
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.tensors import map_tensors, to_device
from prox24_lightning.weights.free_order import FreeOrder
from prox24_lightning.weights.layer_matrix import why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight

logger = logging.getLogger(__name__)

_SEQUENCES = 2
"""Of the first batch, on which the order is proved."""


def proved_stream(
    model: nn.Module, inputs: BlockInputs, batch: Any, weights: Sequence[GroupedWeight], holders: Mapping[Tensor, int]
) -> FreeOrder | None:
    """Return the order of the residual stream; None where it stays as it is, and log why. All ranks call it.

    Args:
        model: dense, in evaluation mode.
        inputs: of the first block.
        batch: of the model.
        weights: those that become 2:4.
        holders: parameter -> in how many places of the model it is.
    """
    free: FreeOrder | None = None
    problem: str | None = None
    wanted = {weight.module for weight in _readers(weights)}
    try:
        free = _find(model, inputs, batch, holders)
        if wanted.isdisjoint(free.consumers):
            problem = "no layer that becomes 2:4 in groups along its inputs reads it"
        problem = problem or why_fixed(free, {})
    except Exception as error:  # of the user's forward
        problem = str(error) if isinstance(error, ValueError) else describe(error)
    problem = next((found for found in gathered_objects(problem) if found), None)
    if problem is not None:
        logger.info("the order of the residual stream is fixed: %s", problem)
        return None
    return free


def _find(model: nn.Module, inputs: BlockInputs, batch: Any, holders: Mapping[Tensor, int]) -> FreeOrder:
    if inputs.blocks.whole:
        raise ValueError("the model has no chain of blocks")
    if inputs.home != inputs.device:
        raise ValueError(f"the model lies on {inputs.home}, and blocks are solved on {inputs.device}")
    batch = to_device(dict(batch) if isinstance(batch, Mapping) else batch, inputs.home)
    rows = inputs.hidden[0].shape[0]

    def first(tensor: Tensor) -> Tensor:
        return tensor[:_SEQUENCES] if tensor.dim() and tensor.shape[0] == rows else tensor

    few = map_tensors(first, batch)
    try:
        call_model(model, to_device(few, inputs.home, copy=True))
    except Exception:  # a model whose batches are of one size
        few = batch
    width = inputs.hidden[0].shape[-1]
    return find_stream_order(model, inputs.blocks, width, partial(_call, model, few, inputs.home), holders)


def _call(model: nn.Module, batch: Any, home: torch.device) -> Any:
    return call_model(model, to_device(batch, home, copy=True))


def _readers(weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
    return [
        weight
        for weight in weights
        if weight.geometry == "row"
        and not weight.is_experts
        and why_not_solvable(weight.module, weight.parameter_name) is None
    ]


def choose_stream_order(
    free: FreeOrder, inputs: BlockInputs, weights: Sequence[GroupedWeight], bar: LayerProgress
) -> ChosenOrder | None:
    """Return the order of the residual stream that loses least on the dense model's inputs, the same on all ranks.

    Args:
        free: what moves.
        inputs: of the first block, where they stay.
        weights: those that become 2:4.
        bar: says what is going on.
    """
    readers = {weight.module: weight for weight in _readers(weights) if weight.module in free.consumers}
    search = StreamOrderSearch(free, readers, inputs.device)
    with inputs.copied() as own:
        for index in range(len(own.blocks)):
            bar.describe(f"order of the residual stream: {own.blocks.names[index]}")
            with own.on_device(index) as block:
                inside = {
                    layer: weight for layer, weight in readers.items() if own.blocks.owns(index, weight.module_name)
                }
                runs = own.runs(index, block)
                groups = find_input_groups(list(inside), runs[0]) if inside else []
                check_same_input_groups(groups, {layer: weight.name for layer, weight in inside.items()})
                for group in groups:
                    hessian = input_group_hessian(group, runs).hessian
                    for layer in group.layers:
                        search.add(layer, hessian, inside[layer].module_name)
                own.advance(index, block)
    bar.describe("order of the residual stream")
    return search.best()
