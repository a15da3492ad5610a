"""Masked gradient updates: the best values for a given mask, by conjugate gradients in every row at once."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.solvers.loss import regularized

_CHECK_EVERY = 10


def masked_gradient(
    weight: Tensor,
    dense: Tensor,
    moments: Tensor,
    mask: Tensor,
    *,
    steps: int = 300,
    tolerance: float = 1e-4,
    damping: float = 1e-3,
) -> Tensor:
    """Minimise ``1/2 tr((V - dense) H (V - dense)^T)`` over ``V`` that is zero outside ``mask``.

    The rows are independent least-squares problems that share ``H``. Each runs conjugate gradients on its own
    support, preconditioned by ``diag(H)``, all rows in one matrix product a step. arXiv 2501.18015 does plain masked
    gradient steps; these are their accelerated form, with the exact line search of a quadratic.

    Args:
        weight: (out_features, in_features), the start; entries outside ``mask`` are ignored.
        dense: (out_features, in_features), the weight whose outputs are to be kept.
        moments: (in_features, in_features).
        mask: bool, (out_features, in_features).
        steps: at most so many gradient steps.
        tolerance: stop when ten steps together lower the loss by less than this share of it.
        damping: added to the diagonal of ``moments``, relative to each entry.

    Returns:
        a new weight, exactly zero outside ``mask``, with a loss no higher than that of ``weight * mask``.
    """
    moments = regularized(moments, damping)
    keep = mask.to(weight.dtype)
    inverse_diagonal = keep / moments.diagonal()
    solution = weight * keep
    product = (dense - solution) @ moments
    loss = 0.5 * (product * (dense - solution)).sum()
    residual = product * keep
    preconditioned = residual * inverse_diagonal
    direction = preconditioned.clone()
    energy = (residual * preconditioned).sum(1, keepdim=True)
    lowered = torch.zeros_like(loss)
    # Below this a row has converged. Its numbers would go on shrinking until their quotients are infinite, or NaN.
    finfo = torch.finfo(energy.dtype)
    least = energy * finfo.eps**2 * 1e-4 + finfo.tiny
    for step in range(1, steps + 1):
        product = direction @ moments
        curvature = (direction * product).sum(1, keepdim=True)
        # A row that has converged has no direction left: it stays.
        rate = torch.where((curvature > 0) & (energy > least), energy / curvature, 0)
        solution.addcmul_(direction, rate)
        residual.addcmul_(product, rate, value=-1)
        lowered += 0.5 * (rate * energy).sum()
        torch.mul(residual, inverse_diagonal, out=preconditioned)
        following = (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(energy > least, following / energy, 0)).add_(preconditioned)
        energy = following
        if step % _CHECK_EVERY == 0:
            loss = loss - lowered
            if bool(lowered <= tolerance * loss.clamp_min(0)):
                break
            lowered.zero_()
    return solution
