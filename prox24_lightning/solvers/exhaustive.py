"""Exhaustive search over all 2:4 masks, of rows or of 4 x 4 blocks, for layers small enough to try every mask."""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor

from prox24_lightning.mask.transposable import transposable_patterns
from prox24_lightning.weights.groups import resolve_group_dim

LARGEST = 16
"""Largest number of inputs that are enumerated: 6^(16/4) = 1296 masks a row."""

LARGEST_BLOCKS = 12
"""Largest number of inputs that are enumerated for blocks: 90^(12/4) = 729,000 masks for four rows."""

_PAIRS = list(combinations(range(4), 2))


def best_masks(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``1/2 tr((V - W) H (V - W)^T)`` over all ``V`` that are 2:4 along the inputs, row by row.

    Args:
        weight: (out_features, in_features) with at most 16 inputs; computed in float64.
        hessian: (in_features, in_features), positive definite.

    Returns:
        the best weight (float64) and its bool mask.

    Raises:
        ValueError: for more than 16 inputs, or a number that does not divide by 4.
    """
    dense, hessian = weight.double(), hessian.double()
    resolve_group_dim(dense.shape, 1)
    inputs = dense.shape[1]
    if inputs > LARGEST:
        raise ValueError(f"{inputs} inputs have {6 ** (inputs // 4)} masks a row; at most {LARGEST} are enumerated")
    supports, values, gain = _solved(dense, hessian)
    choice = gain.argmax(0)
    rows = torch.arange(len(dense), device=weight.device)
    best = torch.zeros_like(dense).scatter_(1, supports[choice], values[choice, :, rows])
    mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, supports[choice], True)
    return best, mask


def best_block_masks(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the same loss over all ``V`` whose 4 x 4 blocks have two non-zeros in each row and column.

    The four rows of a block couple only through the mask: each row's loss is tabulated for each of its supports, and
    every combination of transposable patterns is a sum of four table entries.

    Args:
        weight: (out_features, in_features), out_features divides by 4, at most 12 inputs; computed in float64.
        hessian: (in_features, in_features), positive definite.

    Returns:
        the best weight (float64) and its bool mask.

    Raises:
        ValueError: for more than 12 inputs, or a size that does not divide by 4.
    """
    dense, hessian = weight.double(), hessian.double()
    outputs, inputs = (dense.shape[resolve_group_dim(dense.shape, dim)] for dim in (0, 1))
    if inputs > LARGEST_BLOCKS:
        raise ValueError(
            f"{inputs} inputs have {90 ** (inputs // 4)} block masks; at most {LARGEST_BLOCKS} are enumerated"
        )
    supports, values, gain = _solved(dense, hessian)
    pattern_rows = transposable_patterns(weight.device).bool()
    number = {tuple(i in pair for i in range(4)): index for index, pair in enumerate(_PAIRS)}
    pairs = torch.tensor([[number[tuple(row)] for row in mask] for mask in pattern_rows.tolist()], device=weight.device)
    # (combinations, 4): index into `supports` for each of the four rows.
    rows_support = torch.zeros(1, 4, dtype=torch.long, device=weight.device)
    for _ in range(inputs // 4):
        rows_support = (rows_support.unsqueeze(1) * len(_PAIRS) + pairs).flatten(0, 1)
    best, mask = torch.zeros_like(dense), torch.zeros_like(dense, dtype=torch.bool)
    for top in range(0, outputs, 4):
        total = sum(gain[rows_support[:, i], top + i] for i in range(4))
        choice = rows_support[torch.as_tensor(total).argmax()]
        for i, support in enumerate(choice.tolist()):
            best[top + i, supports[support]] = values[support, :, top + i]
            mask[top + i, supports[support]] = True
    return best, mask


def _solved(dense: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return every 2:4 support of a row (supports, kept), its best values (supports, kept, rows), and by how much they
    lower the loss of the all-zero row (supports, rows)."""
    supports = torch.tensor(
        [
            [4 * group + entry for group, pair in enumerate(pairs) for entry in pair]
            for pairs in product(_PAIRS, repeat=dense.shape[1] // 4)
        ],
        device=dense.device,
    )
    # On its support, V solves H_SS v = (W H)_S and lowers the loss of V = 0 by 1/2 v . (W H)_S.
    wanted = (dense @ hessian).T[supports]
    values = torch.linalg.solve(hessian[supports.unsqueeze(2), supports.unsqueeze(1)], wanted)
    return supports, values, (values * wanted).sum(1)
