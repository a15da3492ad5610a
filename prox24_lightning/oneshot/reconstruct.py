"""Refine the weights of a solved block together, by the error of the block's own output."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.solvers.block_reconstruction import Rounding, reconstruct_block
from prox24_lightning.solvers.rounding import round_plainly
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import GroupedWeight

logger = logging.getLogger(__name__)

Arguments = tuple[tuple, dict]


def reconstruct(
    index: int,
    block: nn.Module,
    dense: nn.Module,
    inputs: BlockInputs,
    dense_inputs: BlockInputs,
    weights: Sequence[GroupedWeight],
    masks: Mapping[str, Tensor],
    steps: int,
    form: RoundedForm | None,
) -> None:
    """Lower the error of block ``index``: its outputs on its own inputs against those of the dense block on its own.

    Args:
        block, inputs: pruned, and what reaches it in the pruned model.
        dense, dense_inputs: the dense reference, and what reaches it in the dense model.
        weights: of the block; those in ``masks`` change, and nothing else.
        masks: by the names of the weights.
        steps: gradient steps.
        form: that the matrices among them are rounded to; None rounds nothing.
    """
    name = inputs.blocks.names[index]
    solved = {weight.parameter: weight for weight in weights if weight.name in masks}
    trained = {local: solved[parameter] for local, parameter in block.named_parameters() if parameter in solved}
    calls = [inputs.call(index, number) for number in range(len(inputs))]
    targets = [hidden_state(dense_inputs.run(index, dense, number), name) for number in range(len(inputs))]

    def forward(arguments: Arguments) -> Tensor:
        return hidden_state(replace(calls[0], args=arguments[0], kwargs=arguments[1])(block), name)

    before, after = reconstruct_block(
        block,
        {local: masks[weight.name].to(weight.parameter.device) for local, weight in trained.items()},
        forward,
        [(call.args, call.kwargs) for call in calls],
        targets,
        steps=steps,
        trained={weight.parameter for weight in trained.values()},
        roundings={
            local: rounding_of(weight.module, form)
            for local, weight in trained.items()
            if form is not None and weight.parameter.dim() == 2
        },
        graphed=all(call.random is None for call in calls),
    )
    logger.info("%s: relative error of the output %.5f, %.5f after reconstruction", name, before, after)


def rounding_of(layer: nn.Module, form: RoundedForm) -> Rounding:
    """Return what rounds the weight of a linear layer, as it is laid out in memory, row by row of its matrix."""
    if is_transposed_linear(layer):
        return lambda values: round_plainly(values.T, form).T
    return partial(round_plainly, form=form)
