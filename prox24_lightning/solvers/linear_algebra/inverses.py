"""Inverses of a Hessian plus growing multiples of the identity, which ADMM with a growing rho needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.utils.devices.cuda import allows_tf32
from prox24_lightning.utils.distributed import any_rank, broadcast, raise_on_all_ranks, rank, world_size

_NEWTON_RATIO = 1.4
"""Largest ratio of two rhos at which two Newton-Schulz steps leave less than 1e-7."""
_NEWTON_SIZE = 2048
"""Largest number of inputs for which twelve matrix products are faster than a Cholesky factor on a GPU."""


def shifted_inverses(
    hessian: Tensor, rhos: Sequence[float], *, name: str = "layer", shared: bool = False
) -> Iterator[Tensor]:
    """Yield ``(H + rho I)^-1`` for each ``rho``; each is valid until the next is asked for.

    On a GPU each inverse of a small matrix is computed from the one before: the product of the new matrix and the old
    inverse has eigenvalues between 1 and the ratio of the rhos, so that after scaling, two Newton-Schulz steps of third
    order (Altman 1960) are exact up to rounding.

    Args:
        hessian: positive definite, (in_features, in_features).
        rhos: positive, growing.
        name: for error messages.
        shared: all ranks ask for the inverses of the same matrix: each computes some, and sends them to the others.

    Raises:
        ValueError: on every rank that shares the work, if a matrix has no Cholesky factor.
    """
    ratios = [rho / last for last, rho in itertools.pairwise(rhos)]
    small = hessian.is_cuda and len(hessian) <= _NEWTON_SIZE and hessian.dtype == torch.float32
    newton = small and not allows_tf32() and max(ratios, default=1.0) < _NEWTON_RATIO
    if newton:
        # A matrix that is not positive definite in float32 needs the damping of `cholesky` for every rho.
        indefinite = bool(torch.linalg.cholesky_ex(_shifted(hessian, rhos[0])).info)
        newton = not (any_rank(indefinite, hessian.device) if shared else indefinite)
    if not newton:
        yield from _sent_around(hessian, rhos, name) if shared else (_inverse(hessian, rho, name) for rho in rhos)
        return
    last = _inverse(hessian, rhos[0], name)
    yield last
    for rho, ratio in zip(rhos[1:], ratios, strict=True):
        last = newton_inverse(_shifted(hessian, rho), last * (2 / (1 + ratio)))
        yield last


def _shifted(hessian: Tensor, rho: float) -> Tensor:
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    return shifted


def _inverse(hessian: Tensor, rho: float, name: str) -> Tensor:
    return torch.cholesky_inverse(cholesky(_shifted(hessian, rho), name=name))


def _sent_around(hessian: Tensor, rhos: Sequence[float], name: str) -> Iterator[Tensor]:
    """Each rank computes one of as many inverses as there are ranks, and sends it when its turn comes."""
    received = torch.empty_like(hessian)
    for first in range(0, len(rhos), world_size()):
        together = rhos[first : first + world_size()]
        mine, problem = received, None
        try:
            if rank() < len(together):
                mine = _inverse(hessian, together[rank()], name).contiguous()
        except ValueError as error:
            problem = str(error)
        raise_on_all_ranks(problem)
        for source in range(len(together)):
            yield broadcast(mine if source == rank() else received, source)


def newton_inverse(matrix: Tensor, start: Tensor, steps: int = 2) -> Tensor:
    """Return the inverse of a symmetric matrix by Newton-Schulz steps, each of which cubes ``I - matrix @ start``."""
    for _ in range(steps):
        residual = torch.mm(matrix, start).neg_()
        residual.diagonal().add_(1)
        start = torch.addmm(start, start, torch.addmm(residual, residual, residual))
    return 0.5 * (start + start.T)
