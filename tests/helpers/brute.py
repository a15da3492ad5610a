"""What several test files share: the objective, and an independent brute force that knows nothing of the solver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "prox" / "data" / "prox_golden.npz"

GAP = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Allowed objective gap, relative to the objective of the minimiser."""


def objective(w: Tensor, y: Tensor, strength: Tensor | float) -> Tensor:
    """``1/2 ||w - y||^2 + strength * r(w)`` of groups (n, 4), in float64."""
    w, y = w.double(), y.double()
    a, b, c, d = w.abs().unbind(-1)
    return ((w - y) ** 2).sum(-1) / 2 + strength * (a * b * c + b * c * d + c * d * a + d * a * b)


def relative_gap(w: Tensor, best: Tensor, y: Tensor, strength: Tensor | float) -> Tensor:
    """How much worse ``w`` is than ``best``, relative to the objective of ``best``."""
    least = objective(best, y, strength)
    return (objective(w, y, strength) - least) / (least + 1e-14 * (y.double() ** 2).sum(-1) + 1e-300)


def brute_force(y: np.ndarray, strength: float) -> float:
    """Least objective of one group over all supports and a dense set of starting points.

    Projected coordinate descent on every face from 16 starts: each coordinate step is exact (the objective
    is quadratic in one entry), so each run ends at a stationary point of its face; the smallest value is the answer.
    """
    size = np.abs(y)
    grid = np.array(np.meshgrid(*[[0.05, 0.9]] * 4)).reshape(4, -1).T * size
    best = np.inf
    for face in range(16):
        inside = np.array([(face >> i) & 1 for i in range(4)], dtype=float)
        w = grid * inside
        for _ in range(600):
            before = w.copy()
            for i in range(4):
                a, b, c = (w[:, j] for j in range(4) if j != i)
                w[:, i] = inside[i] * np.maximum(0.0, size[i] - strength * (a * b + b * c + c * a))
            if np.abs(w - before).max() < 1e-15 * size.max():
                break
        a, b, c, d = w.T
        r = a * b * c + b * c * d + c * d * a + d * a * b
        best = min(best, (((w - size) ** 2).sum(1) / 2 + strength * r).min())
    return float(best)


def hard_groups(n: int, seed: int) -> Tensor:
    """Groups (n, 4) in float64 where solvers go wrong: ties, near ties, mixed and heavy magnitudes, zeros."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    regime = torch.arange(n) % 6
    y[regime == 1] = 1 + 0.05 * y[regime == 1]
    y[regime == 2] = (4 * y[regime == 2]).round() / 4
    y[regime == 3] = y[regime == 3] ** 3
    y[regime == 4] *= 10 ** (8 * torch.rand(int((regime == 4).sum()), 4, generator=generator, dtype=torch.float64) - 4)
    y[regime == 5] = y[regime == 5] * (torch.rand(int((regime == 5).sum()), 4, generator=generator) < 0.6)
    return y[torch.randperm(n, generator=generator)]
