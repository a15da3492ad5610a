"""Inverses of a Hessian plus growing multiples of the identity, which ADMM with a growing rho needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.utils.cuda import allows_tf32

_NEWTON_RATIO = 1.4
"""Largest ratio of two rhos at which two Newton-Schulz steps leave less than 1e-7."""
_NEWTON_SIZE = 2048
"""Largest number of inputs for which twelve matrix products are faster than a Cholesky factor on a GPU."""


def shifted_inverses(hessian: Tensor, rhos: Sequence[float], *, name: str = "layer") -> Iterator[Tensor]:
    """Yield ``(H + rho I)^-1`` for each ``rho``.

    On a GPU each inverse of a small matrix is computed from the one before: the product of the new matrix and the old
    inverse has eigenvalues between 1 and the ratio of the rhos, so that after scaling, two Newton-Schulz steps of third
    order (Altman 1960) are exact up to rounding.

    Args:
        hessian: positive definite, (in_features, in_features).
        rhos: positive, growing.
        name: for error messages.
    """
    ratios = [rho / last for last, rho in itertools.pairwise(rhos)]
    small = hessian.is_cuda and len(hessian) <= _NEWTON_SIZE and hessian.dtype == torch.float32
    newton = small and not allows_tf32() and max(ratios, default=1.0) < _NEWTON_RATIO
    last: Tensor | None = None
    for rho, ratio in zip(rhos, [1.0, *ratios], strict=True):
        shifted = hessian.clone()
        shifted.diagonal().add_(rho)
        if last is None:
            # A matrix that is not positive definite in float32 needs the damping of `cholesky` for every rho.
            newton = newton and not int(torch.linalg.cholesky_ex(shifted).info)
        if newton and last is not None:
            last = newton_inverse(shifted, last * (2 / (1 + ratio)))
        else:
            last = torch.cholesky_inverse(cholesky(shifted, name=name))
        yield last


def newton_inverse(matrix: Tensor, start: Tensor, steps: int = 2) -> Tensor:
    """Return the inverse of a symmetric matrix by Newton-Schulz steps, each of which cubes ``I - matrix @ start``."""
    for _ in range(steps):
        residual = torch.mm(matrix, start).neg_()
        residual.diagonal().add_(1)
        start = torch.addmm(start, start, torch.addmm(residual, residual, residual))
    return 0.5 * (start + start.T)
