"""Masked conjugate gradient: the best values for a given mask, all rows at once (``refine="masked_gradient"``)."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.solvers.loss import regularized
from prox24_lightning.utils.distributed import sum_over_ranks
from prox24_lightning.utils.long_work import between_pieces

_CHECK_EVERY = 10


def masked_cg(
    weight: Tensor,
    dense: Tensor,
    hessian: Tensor,
    mask: Tensor,
    *,
    steps: int = 300,
    tolerance: float = 1e-4,
    damping: float = 1e-3,
    shared: bool = False,
) -> Tensor:
    """Minimise ``1/2 tr((V - dense) H (V - dense)^T)`` over ``V`` that is zero outside ``mask``.

    The rows are independent least-squares problems that share ``H``. Each runs conjugate gradients on its own
    support, preconditioned by ``diag(H)``; a step is one matrix product for all rows. arXiv 2501.18015 takes plain
    masked gradient steps; conjugate gradients with the exact line search of a quadratic are their accelerated form.

    Args:
        weight: (out_features, in_features), the start; entries outside ``mask`` are ignored.
        dense: (out_features, in_features), the weight whose outputs are to be kept.
        hessian: (in_features, in_features).
        mask: bool, (out_features, in_features).
        steps: largest number of gradient steps.
        tolerance: the solver stops when ten steps together lower the loss by less than this share of it.
        damping: added to the diagonal of ``hessian``, relative to each entry.
        shared: other ranks solve other rows of the same layer: the solver stops by the loss of all of them.

    Returns:
        a new weight, exactly zero outside ``mask``, with a loss no higher than that of ``weight * mask``.
    """
    hessian = regularized(hessian, damping)
    keep = mask.to(weight.dtype)
    inverse_diagonal = keep / hessian.diagonal()
    solution = weight * keep
    product = (dense - solution) @ hessian
    loss = 0.5 * (product * (dense - solution)).sum()
    residual = product * keep
    preconditioned = residual * inverse_diagonal
    direction = preconditioned.clone()
    squares = (residual * preconditioned).sum(1, keepdim=True)
    lowered = torch.zeros_like(loss)
    # Below this a row has converged; further steps would shrink its numbers until their quotients are infinite or NaN.
    finfo = torch.finfo(squares.dtype)
    floor = squares * finfo.eps**2 * 1e-4 + finfo.tiny
    for step in range(1, steps + 1):
        between_pieces()
        product = direction @ hessian
        curvature = (direction * product).sum(1, keepdim=True)
        # A converged row has no direction left and stays as it is.
        rate = torch.where((curvature > 0) & (squares > floor), squares / curvature, 0)
        solution.addcmul_(direction, rate)
        residual.addcmul_(product, rate, value=-1)
        lowered += 0.5 * (rate * squares).sum()
        torch.mul(residual, inverse_diagonal, out=preconditioned)
        next_squares = (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(squares > floor, next_squares / squares, 0)).add_(preconditioned)
        squares = next_squares
        if step % _CHECK_EVERY == 0:
            loss = loss - lowered
            gained, left = sum_over_ranks(torch.stack([lowered, loss])) if shared else (lowered, loss)
            if bool(gained <= tolerance * left.clamp_min(0)):
                break
            lowered.zero_()
    return solution
