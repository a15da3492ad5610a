"""Choose the order of the inputs of layers, on calibration inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.free_orders.find import find_free_orders
from prox24_lightning.calibration.free_orders.prove import proved
from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.solvers.input_group import Run, input_group_hessian
from prox24_lightning.solvers.input_order.search import best_order, pruned_saliency, saliency
from prox24_lightning.solvers.loss import check_layer
from prox24_lightning.utils.distributed import from_first, gathered_objects
from prox24_lightning.weights.free_order import FreeOrder
from prox24_lightning.weights.layer_matrix import as_matrix, why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded

ReorderInputs = bool | Literal["stream"]
"""Which orders of inputs are chosen: none, those inside of blocks, or that of the residual stream too."""

_ZEROS = 0.25
"""A weight with a larger share of zeros may be masked already, and its mask would not move."""


@dataclass(frozen=True)
class ChosenOrder:
    """An order of inputs that lowers the loss of 2:4.

    Attributes:
        free: what moves.
        order: (units,), the unit that comes to each place.
        change: of the saliency that 2:4 prunes, relative: -0.1 is ten per cent less.
    """

    free: FreeOrder
    order: Tensor
    change: float

    @property
    def note(self) -> str:
        """What the layer's row of a report says."""
        return f"inputs reordered ({self.change:+.1%} pruned saliency)"


def proved_orders(
    region: nn.Module, run: Run, weights: Sequence[GroupedWeight], shared: Mapping[Tensor, int]
) -> tuple[list[FreeOrder], dict[nn.Module, str]]:
    """Return the free orders of the inputs of ``weights``, proved by equal outputs, and why others are fixed.

    Args:
        region: holds the layers.
        run: calls it on one batch.
        weights: those that become 2:4; the geometry ``"row"`` alone depends on the order of inputs.
        shared: parameter -> in how many places of the whole model it is.
    """
    wanted = [
        weight.module
        for weight in weights
        if weight.geometry == "row"
        and not weight.is_experts
        and why_not_solvable(weight.module, weight.parameter_name) is None
    ]
    if not wanted:
        return [], {}
    if any(is_sharded(tensor) for tensor in region.parameters()):
        return [], dict.fromkeys(wanted, "the weights are sharded")
    try:
        found, reasons = find_free_orders(region, run, wanted)
        problems = {order: why_fixed(order, shared) for order in found}
        found, refuted = proved([order for order, problem in problems.items() if problem is None], run)
        reasons |= refuted
        reasons |= {layer: why for order, why in problems.items() if why is not None for layer in order.consumers}
    except Exception as error:  # of the user's forward
        found, reasons = [], dict.fromkeys(wanted, f"{type(error).__name__}: {error}")
    names = {weight.module: weight.module_name for weight in weights}
    every = gathered_objects([[names.get(consumer) for consumer in order.consumers] for order in found])
    if any(one != every[0] for one in every):
        return [], dict.fromkeys(wanted, "the ranks have found different orders free")
    return found, reasons


def why_fixed(order: FreeOrder, shared: Mapping[Tensor, int]) -> str | None:
    """Return why tensors of ``order`` may not move: they are shared, or masked already; None if they may."""
    for moved in order.tensors:
        tensor, name = moved.tensor, f"{type(moved.module).__name__}.{moved.name}"
        if shared.get(tensor, 1) > 1:
            return f"{name} is shared"
        if tensor.dim() > 1 and float((tensor == 0).float().mean()) > _ZEROS:
            return f"{name} holds many zeros: a mask may be on it"
    return None


def holders(model: nn.Module) -> Counter[Tensor]:
    """Return in how many places of ``model`` each of its parameters is."""
    return Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))


def choose_order(
    free: FreeOrder,
    weights: Mapping[nn.Module, GroupedWeight],
    runs: Sequence[Run],
    *,
    attempt: Callable[[Callable[[], HessianAccumulator]], HessianAccumulator] | None = None,
) -> ChosenOrder | None:
    """Return the order that the search finds, the same on all ranks; None if it finds none that is better.

    Args:
        free: what may move.
        weights: layer -> its weight, for those that become 2:4; other consumers do not count.
        runs: each calls the block that holds the layers on one calibration batch.
        attempt: see :func:`~prox24_lightning.solvers.input_group.input_group_hessian`.

    Raises:
        ValueError: for inputs or weights that are not finite.
    """
    values = []
    for consumer in free.consumers:
        if consumer not in weights:
            continue
        name = weights[consumer].module_name
        hessian = input_group_hessian(InputGroup((consumer,), once=True), runs, attempt=attempt).hessian
        matrix = as_matrix(consumer)
        check_layer(matrix, hessian, name)
        hessian = hessian.to(matrix)
        # One row for each output and column of a unit.
        columns = free.matrix_columns(consumer)
        values.append(saliency(matrix, hessian, name=name)[:, columns].movedim(2, 0).flatten(0, 1))
    if not values:
        return None
    together = torch.cat(values)
    order = from_first(best_order(together, runs=free.runs).cpu())
    before, after = pruned_saliency(together), pruned_saliency(together[:, order.to(together.device)])
    return ChosenOrder(free, order, float(after / before - 1)) if after < before else None
