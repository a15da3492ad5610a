"""Ablations of the layer-wise prox, on real layers with the Hessians of real inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.mask import mask_24
from prox24_lightning.schedules import Constant, Exponential, Linear, Schedule
from prox24_lightning.solvers.admm import admm
from prox24_lightning.solvers.layer import solve_layer
from prox24_lightning.solvers.loss import input_scale, relative_loss
from prox24_lightning.solvers.masked_cg import masked_cg
from prox24_lightning.solvers.prox_step import STRENGTHS
from prox24_lightning.weights.groups import MATRIX_DIMS, Dim

SCHEDULES: dict[str, Schedule] = {
    "exponential 0.01 to 100": STRENGTHS,
    "exponential 0.1 to 10": Exponential(0.1, 10.0),
    "linear 0.01 to 100": Linear(0.01, 100.0),
    "constant 1": Constant(1.0),
}

Layers = Mapping[str, tuple[Tensor, Tensor]]
"""Name -> weight (out_features, in_features) and hessian (in_features, in_features)."""

Pruned = dict[str, Tensor]

Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Weight and hessian -> the pruned weight before and after masked gradient."""


def variants(steps: tuple[int, ...] = (25, 50, 100, 200, 400), base: int = 100) -> dict[str, Solver]:
    """Return the variants by name: functions of weight and Hessian that return the pruned weight.

    One choice is changed at a time: the number of steps, the schedule of the strength, the metric (a weight alone, or
    times the rms of its input), the geometry. Magnitude, Wanda and SparseGPT are the variants without the prox.
    """
    table: dict[str, Solver] = {}
    for count in steps:
        table[f"steps: {count}"] = _variant(count, STRENGTHS, True, -1)
    for name, schedule in SCHEDULES.items():
        table[f"schedule: {name}"] = _variant(base, schedule, True, -1)
    table["metric: weights alone"] = _variant(base, STRENGTHS, False, -1)
    table["geometry: column"] = _variant(base, STRENGTHS, True, MATRIX_DIMS["column"])
    table["geometry: block"] = _variant(base, STRENGTHS, True, MATRIX_DIMS["block"])
    table["no prox: magnitude"] = lambda weight, hessian: _solved(weight, hessian, "magnitude")
    table["no prox: wanda"] = lambda weight, hessian: _solved(weight, hessian, "wanda")
    table["no prox: sparsegpt"] = lambda weight, hessian: _solved(weight, hessian, "sparsegpt")
    return table


def _variant(steps: int, schedule: Schedule, metric: bool, dim: Dim) -> Solver:
    def run(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        found = admm(weight, hessian, steps=steps, strengths=schedule, dim=dim, by_input=metric)
        mask = mask_24(found, dim=dim, scale=input_scale(hessian) if metric else None)
        return found * mask, masked_cg(found * mask, weight, hessian, mask)

    return run


def _solved(weight: Tensor, hessian: Tensor, method: Any) -> tuple[Tensor, Tensor]:
    alone = solve_layer(weight, hessian, method=method, refine=None)
    return alone.weight, masked_cg(alone.weight, weight, hessian, alone.mask)


@torch.no_grad()
def ablate(
    layers: Layers,
    score: Callable[[Pruned], float],
    *,
    steps: tuple[int, ...] = (25, 50, 100, 200, 400),
    base: int = 100,
    tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Prune every layer by every variant, without and with masked gradient.

    Args:
        layers: what is pruned, each on its own hessian.
        score: pruned weights by name -> how far the whole model's output moves.
        steps: proximal steps that are compared.
        base: steps of all other variants.

    Returns:
        one dict for each variant: mean relative local loss and the model's score, before and after refinement.
    """
    table = []
    for name, run in variants(steps, base).items():
        alone: Pruned = {}
        refined: Pruned = {}
        losses = [0.0, 0.0]
        for layer, (weight, hessian) in layers.items():
            alone[layer], refined[layer] = run(weight, hessian)
            for index, found in enumerate((alone[layer], refined[layer])):
                losses[index] += relative_loss(found, weight, hessian) / len(layers)
        table.append(
            {
                "variant": name,
                "loss": losses[0],
                "loss_refined": losses[1],
                "output_error": score(alone),
                "output_error_refined": score(refined),
            }
        )
        tick(name)
    return table
