"""The true optimum over all 2:4 masks, for layers small enough to try every one."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor

from prox24_lightning.groups import resolve_group_dim

LARGEST = 16
"""Most inputs that are enumerated: 6^(16/4) = 1296 masks a row."""


def best_masks(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """``min_V 1/2 tr((V - W) H (V - W)^T)`` over all ``V`` that are 2:4 along the inputs: mask and values, row by row.

    Args:
        weight: (out_features, in_features) with at most 16 inputs; computed in float64.
        moments: (in_features, in_features), positive definite.

    Returns:
        the best weight (float64) and its bool mask.

    Raises:
        ValueError: for more than 16 inputs, or a number that does not divide by 4.
    """
    dense, moments = weight.double(), moments.double()
    resolve_group_dim(dense.shape, 1)
    inputs = dense.shape[1]
    if inputs > LARGEST:
        raise ValueError(f"{inputs} inputs have {6 ** (inputs // 4)} masks a row; at most {LARGEST} are enumerated")
    choices = list(combinations(range(4), 2))
    supports = torch.tensor(
        [
            [4 * group + entry for group, pair in enumerate(pairs) for entry in pair]
            for pairs in product(choices, repeat=inputs // 4)
        ],
        device=weight.device,
    )
    # On its support, V solves H_SS v = (W H)_S; what it wins over V = 0 is 1/2 v . (W H)_S.
    wanted = (dense @ moments).T[supports]
    values = torch.linalg.solve(moments[supports.unsqueeze(2), supports.unsqueeze(1)], wanted)
    choice = (values * wanted).sum(1).argmax(0)
    rows = torch.arange(len(dense), device=weight.device)
    best = torch.zeros_like(dense).scatter_(1, supports[choice], values[choice, :, rows])
    mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, supports[choice], True)
    return best, mask
