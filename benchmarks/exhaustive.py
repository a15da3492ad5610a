"""How far each method ends from the true optimum over all 2:4 masks, on layers of 16 inputs.

    python -m benchmarks.exhaustive

Rows of the table are correlations between inputs (``x = sqrt(c) * common + sqrt(1 - c) * own``, Gaussian), cells the
gap ``loss / optimum - 1`` of the local squared loss, summed over all rows of all layers. Every method is refined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import auto_cli

from benchmarks.result_files import write_result
from prox24_lightning.solvers import Method, solve_layer
from prox24_lightning.solvers.exhaustive import best_masks
from prox24_lightning.solvers.loss import row_losses

INPUTS = 16


def main(
    output: Path = Path("benchmarks/results"),
    correlations: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9, 0.97),
    layers: int = 5,
    rows: int = 64,
    tokens: int = 256,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Solve the layers by every method, enumerate all masks, and write the table.

    Args:
        output: folder of the result.
        correlations: between any two inputs.
        layers: layers a correlation.
        rows: output features a layer.
        tokens: inputs a layer's Hessian is the mean of.
        seed: of weights and inputs.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    table: list[dict[str, Any]] = []
    for correlation in correlations:
        generator = torch.Generator().manual_seed(seed)
        optimum = 0.0
        losses = dict.fromkeys(get_args(Method), 0.0)
        hits = dict.fromkeys(get_args(Method), 0)
        for _ in range(layers):
            weight = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64)
            common = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
            own = torch.randn(tokens, INPUTS, generator=generator, dtype=torch.float64)
            x = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
            hessian = x.T @ x / tokens
            best, mask = best_masks(weight, hessian)
            optimum += float(row_losses(best, weight, hessian).sum())
            for method in losses:
                found = solve_layer(weight, hessian, method=method)
                losses[method] += float(row_losses(found.weight, weight, hessian).sum())
                hits[method] += int((found.mask == mask).all(1).sum())
        row: dict[str, Any] = {"correlation": correlation}
        for method, loss in losses.items():
            row[method] = f"{loss / optimum - 1:.2%} ({hits[method] / (layers * rows):.0%})"
        table.append(row)
    note = (
        f"{layers} layers of {rows} x {INPUTS} a correlation, {tokens} tokens, seed {seed}, float64; mean gap to the "
        "optimum over all masks, in brackets the share of rows whose mask is the best one. All with masked gradient."
    )
    write_result(output, "exhaustive", "Gap to the best 2:4 mask", table, note=note)


if __name__ == "__main__":
    auto_cli(main)
