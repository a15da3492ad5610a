"""SparseGPT (arXiv 2301.00774): column by column, prune and let the columns that follow absorb the error."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.mask import mask_24, transposable_mask
from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.groups import Dim


def inverse_factor(hessian: Tensor, damping: float = 0.01, *, name: str = "layer") -> Tensor:
    """Return the upper Cholesky factor ``U`` of ``(hessian + damping * mean(diag) * I)^-1 = U^T U``."""
    lower = cholesky(hessian, damping=damping, name=name)
    return cholesky(torch.cholesky_inverse(lower), name=name).mT.contiguous()


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    dim: Dim = -1,
    damping: float = 0.01,
    block: int = 128,
    name: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Prune with the optimal-brain-surgeon update, the mask of each group chosen when the sweep reaches it.

    Args:
        weight: (out_features, in_features), float32 or float64; in_features (``dim=-1``) or out_features (``dim=0``)
            divides by 4, or both (a pair).
        hessian: (in_features, in_features), same dtype.
        dim: the dimension along which the groups of four lie; a pair: the mask of each 4 x 4 block is chosen when the
            sweep reaches its first column.
        damping: added to the diagonal, relative to its mean.
        block: columns between two updates of the whole rest; changes the time, not the result beyond rounding.

    Returns:
        the pruned weight, updated, and its bool mask.
    """
    upper = inverse_factor(hessian, damping, name=name)
    rest = weight.clone()
    # A block ends where a group ends, so that a group is chosen with all updates of its four columns applied.
    block = max(4, block - block % 4)
    mask = torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    along_inputs = not isinstance(dim, int) or dim % 2 == 1
    choose = mask_24 if isinstance(dim, int) else transposable_mask
    for start in range(0, columns, block):
        between_pieces()
        stop = min(start + block, columns)
        part = rest[:, start:stop]
        factor = upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            if not along_inputs:
                mask[:, start + i] = mask_24(part[:, i], dim=0)
            elif i % 4 == 0:
                # Score w^2 / [U_ii]^2; only its order matters, so the square is left out.
                mask[:, start + i : start + i + 4] = choose(part[:, i : i + 4], scale=1 / diagonal[i : i + 4])
            error = torch.where(mask[:, start + i], 0, part[:, i]) / diagonal[i]
            errors[:, i] = error
            part[:, i:].addr_(error, factor[i, i:], alpha=-1)
        rest[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return torch.where(mask, rest, 0.0), mask
