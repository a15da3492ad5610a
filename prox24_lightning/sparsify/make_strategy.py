"""From the settings of a run to its strategy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prox24_lightning.convert.layer_times import layer_times
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.solve_watch import SolveWatch
from prox24_lightning.sparsify.strategies.base import Strategy
from prox24_lightning.sparsify.strategies.keep_zeros import KeepZeros
from prox24_lightning.sparsify.strategies.post_step.strategy import PostStepProx
from prox24_lightning.sparsify.strategies.progressive.strategy import Progressive
from prox24_lightning.weights.selection import GroupedWeight

BUDGET_TOKENS = 4096
"""Rows of a layer's input at which its times count for the budget."""


def make_strategy(
    config: SparsifyConfig,
    model: nn.Module,
    weights: Sequence[GroupedWeight],
    watch: SolveWatch,
    *,
    root_is_called: bool,
) -> Strategy:
    """Return a fresh strategy.

    Args:
        config: settings of the run.
        model: holds the weights.
        weights: that become 2:4.
        watch: shows and stops the solving of blocks.
        root_is_called: whether training calls the model itself, rather than parts of it.
    """
    if config.strategy == "keep":
        return KeepZeros()
    if config.strategy == "post_step":
        return PostStepProx(config.strength_schedule, config.fraction_schedule, refit=config.refit)
    return Progressive(
        model,
        root_is_called=root_is_called,
        dense_target=config.dense_target,
        reconstruction_steps=config.reconstruction_steps,
        gradient_weighting=config.gradient_weighting,
        calibration=config.calibration,
        reorder_inputs=config.reorder_inputs,
        budget=config.budget,
        batches=config.calibration_batches,
        token_weighting=config.token_weighting,
        damping=config.damping,
        layer_times=_times(weights) if config.budget else None,
        watch=watch,
    )


def _times(weights: Sequence[GroupedWeight]) -> LayerTimes | None:
    shapes = {w.name: (w.parameter.shape[0], w.parameter.shape[1]) for w in weights if w.parameter.dim() == 2}
    return layer_times(shapes, BUDGET_TOKENS) or None
