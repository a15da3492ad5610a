"""Spend a budget of the speed-up on the layers that 2:4 hurts most for the time that it saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from prox24_lightning.calibration.blocks import call_model
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.model_loss import ModelLoss
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.budget.measure import (
    BudgetChoices,
    ModelLosses,
    Visit,
    choose_layers,
    most_steps,
    split_batches,
    usable,
    warn_of_own_losses,
)
from prox24_lightning.solvers.budget.price import LayerTimes, reason, times_or_products
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.tensors import to_device
from prox24_lightning.weights.selection import GroupedWeight


def choose_dense_layers(
    model: nn.Module,
    inputs: BlockInputs,
    batches: Sequence[Any],
    chosen: Sequence[GroupedWeight],
    budgets: Sequence[float],
    bar: LayerProgress,
    times: LayerTimes | None = None,
) -> BudgetChoices:
    """Return the price of each of ``chosen`` that is no set of experts, and the choice at each budget, the same on all
    ranks.

    Where the model does not lie on the device as a whole, its own loss cannot be measured: each layer's own loss takes
    its place.

    Args:
        model: of the blocks; as before afterwards.
        inputs: of the first block, where they stay.
        batches: of this run.
        budgets: shares of the speed-up given back.
        times: of the layers; None, or where one is missing: by multiply-adds.
    """
    layers = [weight for weight in chosen if not weight.is_experts]
    losses = _model_losses(model, inputs, batches)
    with bar.measured(most_steps(len(layers), budgets, losses)) as step:
        return choose_layers(
            layers,
            partial(_each_block, inputs, layers),
            budgets,
            times_or_products(layers, times),
            losses,
            step=step,
        )


def reasons_to_stay(
    model: nn.Module,
    inputs: BlockInputs,
    batches: Sequence[Any],
    chosen: Sequence[GroupedWeight],
    budget: float,
    bar: LayerProgress,
    times: LayerTimes | None = None,
) -> dict[str, str]:
    """Return the names of the weights that stay dense within a budget, and why.

    The arguments are those of :func:`choose_dense_layers`.
    """
    found = choose_dense_layers(model, inputs, batches, chosen, [budget], bar, times)
    return {price.name: reason(price) for price in found.prices if price.name in found.choices[0].dense}


def _each_block(inputs: BlockInputs, layers: Sequence[GroupedWeight], visit: Visit) -> None:
    with inputs.copied() as own:
        for index in range(len(own.blocks)):
            inside = {weight.module: weight for weight in layers if own.blocks.owns(index, weight.module_name)}
            with own.on_device(index) as block:
                runs = own.runs(index, block)
                groups = find_input_groups(list(inside), runs[0])
                check_same_input_groups(groups, {layer: weight.name for layer, weight in inside.items()})
                visit(groups, inside, runs)
                own.advance(index, block)


def _model_losses(model: nn.Module, inputs: BlockInputs, batches: Sequence[Any]) -> ModelLosses | None:
    losses: ModelLosses | None = None
    problem: str | None = f"the model lies on {inputs.home}, and blocks are solved on {inputs.device}"
    if inputs.home == inputs.device:
        try:
            losses, problem = ModelLosses(*(_loss(model, batches[part]) for part in split_batches(len(batches)))), None
        except Exception as error:  # of the user's forward
            problem = describe(error)
    # What one rank cannot measure, the others do not: they average.
    if (problem := next((found for found in gathered_objects(problem) if found), None)) is None:
        return losses
    warn_of_own_losses(problem)
    return None


def _loss(model: nn.Module, batches: Sequence[Any]) -> Callable[[], float]:
    home = next(model.parameters()).device
    moved = [to_device(dict(one) if isinstance(one, Mapping) else one, home) for one in batches]
    ids = [one.get("input_ids") if isinstance(one, dict) else None for one in moved]
    return usable(ModelLoss([partial(_call, model, one) for one in moved], ids))


def _call(model: nn.Module, batch: Any) -> Any:
    return call_model(model, to_device(batch, next(model.parameters()).device, copy=True))
