"""Rows on which Wanda or SparseGPT end with a lower loss than the prox, found by search over random layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.solvers import Method, solve_layer
from prox24_lightning.solvers.exhaustive import best_masks
from prox24_lightning.solvers.loss import row_losses

INPUTS = 8
"""36 masks a row: the table of all of them explains what happened."""
WORSE = 0.01
"""A row counts as a failure where the prox loses by more than this share of the rival's loss."""


@dataclass(frozen=True)
class Failure:
    """The row on which the prox loses most.

    Attributes:
        rival: the method that wins.
        weight: (8,).
        hessian: (8, 8).
        losses: loss of every method's mask with its best values, and of the best mask.
        masks: which entries they keep.
    """

    rival: str
    weight: Tensor
    hessian: Tensor
    losses: dict[str, float]
    masks: dict[str, list[int]]


def search(
    *, layers: int = 20, rows: int = 64, seed: int = 0, tick: Callable[[str], None] = lambda text: None
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Compare row by row on layers of 8 inputs with random spectra, from white to nearly singular.

    Returns:
        one dict for each rival: how often the prox is worse and better by more than ``WORSE``, the mean loss over the
        optimum of both, and of the rows that it loses: how much of the loss is at stake (median), how many are
        stuck in a mask that no exchange within one group improves, and how many are won with four times as many steps;
        and the worst row against each rival.
    """
    generator = torch.Generator().manual_seed(seed)
    methods: tuple[Method, ...] = ("wanda", "sparsegpt", "prox")
    all_losses: dict[str, list[Tensor]] = {name: [] for name in (*methods, "prox_long", "best")}
    neighbours: list[Tensor] = []
    found: dict[str, tuple[float, Failure]] = {}
    for number in range(layers):
        weight = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64))
        decades = 3 * float(torch.rand((), generator=generator))
        hessian = (basis * torch.logspace(0, -decades, INPUTS, dtype=torch.float64)) @ basis.T
        best, best_mask = best_masks(weight, hessian)
        here = {"best": (row_losses(best, weight, hessian), best_mask)}
        for method in methods:
            here[method] = _refined(weight, hessian, method)
        here["prox_long"] = _refined(weight, hessian, "prox", steps=800)
        for name, (losses, _) in here.items():
            all_losses[name].append(losses)
        neighbours.append(_best_exchange(weight, hessian, here["prox"][1]))
        for rival in ("wanda", "sparsegpt"):
            excess = here["prox"][0] / here[rival][0].clamp_min(1e-300) - 1
            row = int(excess.argmax())
            if rival not in found or float(excess[row]) > found[rival][0]:
                example = Failure(
                    rival,
                    weight[row],
                    hessian,
                    {name: float(losses[row]) for name, (losses, _) in here.items()},
                    {name: mask[row].nonzero()[:, 0].tolist() for name, (_, mask) in here.items()},
                )
                found[rival] = (float(excess[row]), example)
        tick(f"layer {number + 1} of {layers}")
    joined = {name: torch.cat(parts) for name, parts in all_losses.items()}
    exchange = torch.cat(neighbours)
    return [_summary(rival, joined, exchange) for rival in ("wanda", "sparsegpt")], [f for _, f in found.values()]


def _refined(weight: Tensor, hessian: Tensor, method: Method, steps: int | None = None) -> tuple[Tensor, Tensor]:
    solution = solve_layer(weight, hessian, method=method, steps=steps, tolerance=0.0)
    return row_losses(solution.weight, weight, hessian), solution.mask


def _best_exchange(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The lowest loss of each row when the mask of one group is replaced: by trying all."""
    group_masks = torch.tensor([[i in (a, b) for i in range(4)] for a in range(4) for b in range(a + 1, 4)])
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for group in range(INPUTS // 4):
        for choice in group_masks:
            other = mask.clone()
            other[:, 4 * group : 4 * group + 4] = choice
            best = torch.minimum(best, _mask_losses(weight, hessian, other))
    return best


def _mask_losses(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The loss of every row with the best values on its mask."""
    support = mask.nonzero()[:, 1].view(len(mask), -1)
    inner = hessian[support.unsqueeze(2), support.unsqueeze(1)]
    wanted = (weight @ hessian).gather(1, support)
    won = (torch.linalg.solve(inner, wanted.unsqueeze(2)).squeeze(2) * wanted).sum(1)
    return 0.5 * (((weight @ hessian) * weight).sum(1) - won)


def _summary(rival: str, losses: dict[str, Tensor], exchange: Tensor) -> dict[str, Any]:
    prox, other, best = losses["prox"], losses[rival], losses["best"]
    lost, won = prox > other * (1 + WORSE), other > prox * (1 + WORSE)
    return {
        "rival": rival,
        "rows": len(prox),
        "prox_worse": float(lost.double().mean()),
        "prox_better": float(won.double().mean()),
        "prox_over_best": float(prox.sum() / best.sum() - 1),
        "rival_over_best": float(other.sum() / best.sum() - 1),
        "median_excess_where_worse": float((prox / other - 1)[lost].median()) if lost.any() else 0.0,
        "stuck_where_worse": _share(exchange >= prox * (1 - 1e-6), lost),
        "won_with_4x_steps": _share(losses["prox_long"] <= other * (1 + WORSE), lost),
    }


def _share(holds: Tensor, among: Tensor) -> float:
    return float(holds[among].double().mean()) if among.any() else 0.0
