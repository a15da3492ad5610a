"""Inverses of one matrix plus growing multiples of the identity, as a splitting with a growing penalty needs them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prox24_lightning.solvers.sparsegpt import cholesky
from prox24_lightning.utils.tf32 import allows_tf32

_NEWTON_RATIO = 1.4
"""Of two rhos: from there on two steps would leave more than 1e-7."""
_NEWTON_SIZE = 2048
"""Up to so many inputs a Cholesky factor leaves most of a GPU idle, and twelve matrix products take less time."""


def shifted_inverses(moments: Tensor, rhos: Sequence[float], *, name: str = "layer") -> Iterator[Tensor]:
    """``(moments + rho I)^-1`` for one ``rho`` after the other.

    On a GPU that of a small matrix comes from the last one: the product of the two matrices has its eigenvalues between
    1 and the ratio of the rhos, so after scaling two Newton-Schulz steps of third order (Altman 1960) end at what
    rounding leaves.

    Args:
        moments: positive definite, (in_features, in_features).
        rhos: positive, growing.
        name: for error messages.
    """
    ratios = [rho / last for last, rho in itertools.pairwise(rhos)]
    small = moments.is_cuda and len(moments) <= _NEWTON_SIZE and moments.dtype == torch.float32
    newton = small and not allows_tf32() and max(ratios, default=1.0) < _NEWTON_RATIO
    last: Tensor | None = None
    for rho, ratio in zip(rhos, [1.0, *ratios], strict=True):
        shifted = moments.clone()
        shifted.diagonal().add_(rho)
        if last is None:
            # Of a matrix that is not positive definite in float32 each takes what help it needs.
            newton = newton and not int(torch.linalg.cholesky_ex(shifted).info)
        if newton and last is not None:
            last = newton_inverse(shifted, last * (2 / (1 + ratio)))
        else:
            last = torch.cholesky_inverse(cholesky(shifted, name=name))
        yield last


def newton_inverse(matrix: Tensor, start: Tensor, steps: int = 2) -> Tensor:
    """The inverse of a symmetric matrix by Newton-Schulz steps of third order: each cubes ``I - matrix @ start``."""
    for _ in range(steps):
        residual = torch.mm(matrix, start).neg_()
        residual.diagonal().add_(1)
        start = torch.addmm(start, start, torch.addmm(residual, residual, residual))
    return 0.5 * (start + start.T)
