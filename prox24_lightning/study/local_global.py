"""The gap of every method to the best of all masks, on layers small enough to try each mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from prox24_lightning.solvers import Method, solve_layer
from prox24_lightning.solvers.exhaustive import LARGEST, LARGEST_BLOCKS, best_block_masks, best_masks
from prox24_lightning.solvers.loss import row_losses
from prox24_lightning.weights.groups import MATRIX_DIMS, Geometry

BEST = {"row": best_masks, "block": best_block_masks}
LARGEST_INPUTS = {"row": LARGEST, "block": LARGEST_BLOCKS}


def random_layer(
    rows: int, inputs: int, correlation: float, generator: torch.Generator, tokens: int = 256
) -> tuple[Tensor, Tensor]:
    """Return a Gaussian weight and the Hessian of inputs ``sqrt(c) * common + sqrt(1 - c) * own``, in float64."""
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    common = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    x = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return weight, x.T @ x / tokens


def gaps(
    geometry: Geometry,
    *,
    correlations: Sequence[float],
    sizes: Sequence[int],
    layers: int,
    rows: int,
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return the mean gap ``loss / optimum - 1`` of every method, alone and with masked gradient.

    Args:
        geometry: ``"row"`` or ``"block"``, the two whose optimum can be found.
        correlations: between any two inputs.
        sizes: numbers of inputs.
        layers: layers for each correlation and size; losses are summed over them.
        rows: output features a layer.
        seed: of weights and inputs.
        tick: receives a line of progress.

    Returns:
        one dict for each correlation, size and method: ``gap`` without and ``gap_refined`` with masked gradient, and
        ``best_mask``, the share of rows whose mask is the best one.
    """
    table = []
    for inputs in sizes:
        for correlation in correlations:
            generator = torch.Generator().manual_seed(seed)
            optimum, sums = 0.0, {method: [0.0, 0.0, 0.0] for method in get_args(Method) if method != "keep"}
            for _ in range(layers):
                weight, hessian = random_layer(rows, inputs, correlation, generator)
                best, mask = BEST[geometry](weight, hessian)
                optimum += float(row_losses(best, weight, hessian).sum())
                for method, total in sums.items():
                    found = solve_layer(weight, hessian, method=method, dim=MATRIX_DIMS[geometry])
                    total[0] += float(found.losses.sum())
                    total[1] += float(row_losses(found.weight, weight, hessian).sum())
                    total[2] += float((found.mask == mask).all(1).double().mean()) / layers
            table += [
                {
                    "geometry": geometry,
                    "inputs": inputs,
                    "correlation": correlation,
                    "method": method,
                    "gap": alone / optimum - 1,
                    "gap_refined": refined / optimum - 1,
                    "best_mask": hits,
                }
                for method, (alone, refined, hits) in sums.items()
            ]
            tick(f"{geometry}, {inputs} inputs, correlation {correlation}")
    return table


def mean_gaps(table: Sequence[dict[str, Any]], correlation: float) -> dict[str, float]:
    """Return the mean ``gap_refined`` of every method at one correlation, over all of ``table``."""
    here: dict[str, list[float]] = {}
    for row in table:
        if row["correlation"] == correlation:
            here.setdefault(row["method"], []).append(row["gap_refined"])
    return {method: sum(values) / len(values) for method, values in here.items()}
