"""Move weights into another order of inputs in the middle of training, and all that is kept beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from prox24_lightning.finetune.optimizer_state import OptimizerState
from prox24_lightning.finetune.optimizers import masters_of
from prox24_lightning.solvers.input_order.choose import ChosenOrder
from prox24_lightning.utils.distributed import gathered_objects, rank
from prox24_lightning.weights.free_order import FreeOrder, reorder

log = logging.getLogger(__name__)

Companions = Callable[[FreeOrder], dict[Tensor, list[Tensor]]]
"""Returns tensors of the shape of each moved tensor that have to move with it; raises ``ValueError`` with the reason
where that is not known, so that the order stays as it is."""


def optimizer_companions(optimizers: Sequence[Optimizer]) -> Companions:
    """Return the companions in the state of optimizers: moments, averages, fp32 masters."""

    def companions(order: FreeOrder) -> dict[Tensor, list[Tensor]]:
        tensors = {moved.tensor for moved in order.tensors}
        masters = masters_of(optimizers, tensors)
        found: dict[Tensor, list[Tensor]] = {}
        for optimizer in optimizers:
            for tensor, values in OptimizerState(optimizer, masters).of_one_shape(tensors).items():
                found.setdefault(tensor, []).extend(values)
        return found

    return companions


@torch.no_grad()
def move_all(chosen: Sequence[ChosenOrder], companions: Sequence[Companions]) -> list[ChosenOrder]:
    """Move weights, their gradients and their companions; return the orders that could be moved. All ranks call it."""
    moved = []
    for one in chosen:
        beside: dict[Tensor, list[Tensor]] = {}
        problem: str | None = None
        try:
            for find in companions:
                for tensor, values in find(one.free).items():
                    beside.setdefault(tensor, []).extend(values)
        except ValueError as error:
            problem = str(error)
        problem = next((found for found in gathered_objects(problem) if found), None)
        if problem is not None:
            if rank() == 0:
                log.info("%d inputs of a layer keep their order: %s", one.free.units, problem)
            continue
        for part in one.free.tensors:
            index, tensor = part.index(one.order), part.tensor
            gradient = [tensor.grad] if tensor.grad is not None else []
            # Some optimizers put a copy in the place of the weight's storage.
            together = {each.data_ptr(): each for each in (tensor, *gradient, *beside.get(tensor, ()))}
            for each in together.values():
                reorder(each, part.dim, index)
        moved.append(one)
    return moved
