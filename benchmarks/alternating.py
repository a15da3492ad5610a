"""The published operator, written anew from the paper (arXiv 2501.18015), as the baseline of benchmarks/prox.py."""

from __future__ import annotations

import torch
from torch import Tensor


def alternating_minimisation(weight: Tensor, strength: float, *, sweeps: int = 100, stop: float = 1e-8) -> Tensor:
    """Prox of groups ``(n, 4)``: the best of the two largest, and of coordinate sweeps on three and on four entries.

    Both runs of sweeps start from zero and update the smallest magnitude first,
    ``w_i = max(0, y_i - strength * e2(others))``; they stop when the summed change of all groups is below ``stop``.
    """
    y, order = weight.abs().sort(dim=-1, descending=True)
    y = y.T.contiguous()
    two = torch.zeros_like(y)
    two[:2] = y[:2]
    candidates = [two, _sweeps(y, strength, 3, sweeps, stop), _sweeps(y, strength, 4, sweeps, stop)]
    best, least = two, _objective(two, y, strength)
    for candidate in candidates[1:]:
        value = _objective(candidate, y, strength)
        best = torch.where(value < least, candidate, best)
        least = torch.minimum(value, least)
    return torch.empty_like(weight).scatter_(-1, order, best.T) * weight.sign()


def _sweeps(y: Tensor, strength: float, support: int, sweeps: int, stop: float) -> Tensor:
    w = torch.zeros_like(y)
    for _ in range(sweeps):
        before = w.clone()
        for i in reversed(range(support)):
            a, b, c = (w[j] for j in range(4) if j != i)
            w[i] = (y[i] - strength * (a * b + b * c + c * a)).clamp_min_(0.0)
        if (w - before).abs().sum() < stop:
            break
    return w


def _objective(w: Tensor, y: Tensor, strength: float) -> Tensor:
    a, b, c, d = w
    return ((w - y) ** 2).sum(0) / 2 + strength * (a * b * (c + d) + c * d * (a + b))
