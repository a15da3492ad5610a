"""How many groups and blocks are 2:4 as the strength grows, and how close each block prox comes to the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.mask import mask_24, transposable_mask
from prox24_lightning.mask.transposable import best_patterns, relative_squares
from prox24_lightning.prox import critical_strength_24, prox_24, prox_block
from prox24_lightning.prox.block import BlockMethod, block_objective, descend
from prox24_lightning.weights.blocks_4x4 import to_blocks

LARGEST = 512
"""Rows and columns of a weight that count: 16,384 blocks give a share within half a per cent."""


SPLIT = 192
"""Rows and columns that count where each block is solved many times over: 2,304 blocks."""


def synthetic(kind: str, size: int = LARGEST, seed: int = 0) -> Tensor:
    """Return a ``size`` x ``size`` weight: ``"gaussian"`` or ``"heavy tails"`` (Student's t, 3 degrees of freedom)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, generator=generator)
    if kind == "gaussian":
        return normal
    squares = torch.randn(3, size, size, generator=generator).square().mean(0)
    return normal / squares.sqrt()


def shares(name: str, weight: Tensor, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Return the share of groups and blocks that their prox leaves 2:4, at strengths relative to 1 / rms.

    Groups switch at their critical strength; a block is 2:4 when all of its rows and columns are, after
    :func:`~prox24_lightning.prox.prox_block`.
    """
    weight = weight[:LARGEST, :LARGEST].float()
    weight = weight / weight.square().mean().sqrt()
    critical = {"row": critical_strength_24(weight, dim=1), "column": critical_strength_24(weight, dim=0)}
    table = []
    for strength in strengths:
        row: dict[str, Any] = {"weight": name, "strength": strength}
        row |= {geometry: float((values <= strength).float().mean()) for geometry, values in critical.items()}
        blocks = to_blocks(prox_block(weight, strength)) != 0
        full = (blocks.sum(0) <= 2).all(0) & (blocks.sum(1) <= 2).all(0)
        row["block"] = float(full.float().mean())
        table.append(row)
    return table


def switch_decades(table: Sequence[dict[str, Any]], geometry: str) -> dict[str, float]:
    """Return the decades of strength between 10 % and 90 % of 2:4 groups, by weight.

    Args:
        table: of :func:`shares`, strengths growing.
        geometry: ``"row"``, ``"column"`` or ``"block"``.

    Returns:
        weights whose share crosses both marks within the strengths, interpolated linearly in log10.
    """
    found = {}
    for name in dict.fromkeys(row["weight"] for row in table):
        points = [(math.log10(row["strength"]), row[geometry]) for row in table if row["weight"] == name]
        low, high = (_crossing(points, share) for share in (0.1, 0.9))
        if low is not None and high is not None:
            found[name] = high - low
    return found


def _crossing(points: Sequence[tuple[float, float]], share: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < share <= y1:
            return x0 + (x1 - x0) * (share - y0) / (y1 - y0)
    return None


def splitting_gaps(
    weight: Tensor, strengths: Sequence[float], *, starts: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the objective of each way to take the block prox, relative to the best known.

    ``gap`` is the mean over blocks minus 1, ``blocks_at_best`` the share of blocks at the best known objective. That is
    the lowest of everything compared here, the block's projection, and exact descent to the end from ``starts`` random
    points between 0 and the block.
    """
    weight = weight[:SPLIT, :SPLIT].double()
    weight = weight / weight.square().mean().sqrt()
    y = to_blocks(weight).abs().contiguous()
    generator = torch.Generator().manual_seed(seed)
    table = []
    for strength in strengths:
        lam = torch.full((y.shape[2],), strength, dtype=torch.float64)

        def value(found: Tensor, lam: Tensor = lam) -> Tensor:
            return block_objective(to_blocks(found).abs(), y, lam)

        tries: dict[str, Tensor] = {
            "projection": block_objective(y * best_patterns(relative_squares(y), at_most=True), y, lam),
            "rows, then columns": value(prox_24(prox_24(weight, strength, dim=1), strength, dim=0)),
        }
        ways: list[tuple[BlockMethod, int, int]] = [
            ("averaged", 20, 0),
            ("dykstra", 1, 0),
            ("dykstra", 20, 0),
            ("descent", 1, 4),
            ("dykstra", 5, 2),
        ]
        for method, steps, sweeps in ways:
            parts = ([f"{method} {steps}"] if method != "descent" else []) + ([f"descent {sweeps}"] if sweeps else [])
            name = " + ".join(parts)
            tries[name] = value(prox_block(weight, strength, method=method, steps=steps, sweeps=sweeps))
        best = torch.stack(list(tries.values())).amin(0)
        for _ in range(starts):
            start = y * torch.rand(y.shape, generator=generator, dtype=torch.float64)
            best = torch.minimum(best, block_objective(descend(start, y, lam, prox_24, 8), y, lam))
        table += [
            {
                "strength": strength,
                "way": name,
                "gap": float(values.sum() / best.sum() - 1),
                "blocks_at_best": float((values <= best * (1 + 1e-6)).double().mean()),
            }
            for name, values in tries.items()
        ]
    return table


def retained_norms(name: str, weight: Tensor) -> dict[str, Any]:
    """Return the share of a weight's squared norm that the best mask of each geometry retains."""
    weight = weight[:LARGEST, :LARGEST].double()
    total = weight.square().sum()

    def retained(mask: Tensor) -> float:
        return float((weight * mask).square().sum() / total)

    rows = mask_24(weight, dim=1)
    blocks = to_blocks(weight)
    at_most = best_patterns(relative_squares(blocks), at_most=True)
    best = float((blocks * at_most).square().sum() / total)
    return {
        "weight": name,
        "row": retained(rows),
        "column": retained(mask_24(weight, dim=0)),
        "rows, then columns": retained(rows & mask_24(weight * rows, dim=0)),
        "block (90 masks)": retained(transposable_mask(weight)),
        "block (at most two)": best,
        "blocks better with 7": float((at_most.sum((0, 1)) == 7).double().mean()),
    }
