"""Proximal gradient, the paper's own solver (arXiv 2501.18015): a gradient step on the local loss, then the prox.

Its step is bounded by ``1 / lambda_max(H)``, so directions in which ``H`` is small hardly move within a few hundred
steps; :mod:`~prox24_lightning.solvers.admm` solves the same problem and moves all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.solvers.prox_step import STRENGTHS, apply_prox, inverse_rms, scale_inputs
from prox24_lightning.utils.devices.cuda_graphs import GraphedStep
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.groups import Dim


def largest_eigenvalue(hessian: Tensor, iterations: int = 30) -> Tensor:
    """Return the largest eigenvalue of a positive semi-definite matrix by power iteration, plus 2 % (0-dim).

    The iteration approaches from below; the margin keeps a gradient step of its inverse from diverging.
    """
    vector = hessian.sum(1) + hessian.diagonal()
    for _ in range(iterations):
        vector = hessian @ (vector / torch.linalg.vector_norm(vector).clamp_min(1e-30))
    return 1.02 * torch.linalg.vector_norm(vector)


def proximal_gradient(
    weight: Tensor,
    hessian: Tensor,
    *,
    dim: Dim = -1,
    steps: int = 400,
    momentum: float = 0.0,
    damping: float = 1e-3,
) -> Tensor:
    """Run proximal gradient descent from the dense weight while the strength grows along ``STRENGTHS``.

    Args:
        weight: (out_features, in_features), float32 or float64.
        hessian: (in_features, in_features), same dtype.
        dim: the dimension along which the groups of four lie, or a pair for 4 x 4 blocks.
        momentum: share of the last step that is repeated before the gradient is taken; 0.9 lowers the loss at no cost.
        steps: gradient steps, each followed by the prox.
        damping: added to the diagonal of ``hessian``, relative to each entry.

    Returns:
        a new weight; all but a few groups are 2:4.
    """
    dense, hessian, scale = scale_inputs(weight, hessian, damping)
    step_matrix = hessian / -largest_eigenvalue(hessian)
    z, last, unit = dense.clone(), dense.clone(), inverse_rms(dense, dim)
    strength = torch.zeros_like(unit)

    def step() -> None:
        ahead = torch.lerp(last, z, 1 + momentum)
        last.copy_(z)
        apply_prox(torch.addmm(ahead, ahead - dense, step_matrix), strength, dim, z)

    run = GraphedStep(step, dense.device)
    for number in range(steps):
        torch.mul(unit, STRENGTHS(number / max(1, steps - 1)), out=strength)
        run()
        between_pieces()
    return z / scale
