"""The prox of one group: how many entries its minimiser keeps, where it jumps, and how entries move with the
strength."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.prox import critical_strength_24, prox_24

JUMP = 0.12
"""Neighbouring points count as a jump when their minimisers lie this far apart: many grid steps, as the prox is
continuous with a moderate slope elsewhere."""


@dataclass(frozen=True)
class Plane:
    """The prox at strength 1 of groups ``(x, y, third, fourth)``.

    Attributes:
        axis: values of x and of y.
        third, fourth: the fixed entries.
        kept: (y, x), entries of the minimiser that are not zero.
        jump: (y, x), whether the minimiser jumps between this point and its right or upper neighbour.
    """

    axis: Tensor
    third: float
    fourth: float
    kept: Tensor
    jump: Tensor


def plane(third: float, fourth: float, *, resolution: int = 300, largest: float = 1.4) -> Plane:
    """Return the prox of ``(x, y, third, fourth)`` at strength 1 for x and y from 0 to ``largest``."""
    axis = torch.linspace(0, largest, resolution, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    groups = torch.stack([x, y, torch.full_like(x, third), torch.full_like(x, fourth)], -1)
    found = prox_24(groups, 1.0)
    jump = torch.zeros_like(x, dtype=torch.bool)
    for dim in (0, 1):
        # Swaps of equal entries are no jump of the set of values: compare sorted magnitudes.
        moved = torch.diff(found.sort(-1).values, dim=dim).norm(dim=-1) > JUMP
        view = jump.narrow(dim, 0, resolution - 1)
        view |= moved
    return Plane(axis, third, fourth, (found != 0).sum(-1), jump)


@dataclass(frozen=True)
class Path:
    """``values`` (strengths, 4): the prox of ``group`` at each of ``strengths``; ``critical``: from there on it is
    2:4."""

    group: Tensor
    strengths: Tensor
    values: Tensor
    critical: float


def path(group: list[float], *, points: int = 400) -> Path:
    """Return how the four entries of ``group`` move while the strength grows from 0 to 1.3 times the critical one."""
    y = torch.tensor(group, dtype=torch.float64)
    critical = float(critical_strength_24(y))
    strengths = torch.linspace(0, 1.3 * critical, points, dtype=torch.float64)
    values = prox_24(y.expand(points, 4).contiguous(), strengths.unsqueeze(1))
    return Path(y, strengths, values, critical)
