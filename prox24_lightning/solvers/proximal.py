"""The paper's pruner for one layer: minimise the local squared loss under the 2:4 penalty while its strength grows.

Both solvers work in the coordinates ``Z = V * s`` with ``s`` the rms of each input, in which ``H`` has a unit
diagonal, and both use the exact :func:`~prox24_lightning.prox.prox_24`:

- :func:`prox_gradient` is arXiv 2501.18015's way: a gradient step on the loss, then the prox. Its step is bounded by
  ``1 / lambda_max(H)``, so directions in which ``H`` is small hardly move within a few hundred steps.
- :func:`prox_splitting` solves the same problem by Douglas-Rachford splitting (ADMM): the loss is minimised exactly
  each time, through ``(H + rho I)^-1``, so every direction moves at once.

Strengths are given in units of 1 / rms of the rows of ``Z``: each row is scaled by its own, so the result for
a row depends on no other row (along ``dim=0``, where groups span rows, by the rms of the whole weight).

For 4 x 4 blocks (a pair of dimensions) the prox is that of the block, by a short splitting of its own in every step.
Two sparse copies, one for the rows and one for the columns, would do without it, and end several times further from
the optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.calibration.cuda_graphs import Replayed
from prox24_lightning.prox import prox_24, prox_block
from prox24_lightning.schedules import Exponential, Schedule
from prox24_lightning.solvers.inverses import shifted_inverses
from prox24_lightning.solvers.loss import input_scale, regularized
from prox24_lightning.weights.groups import Dim

STRENGTHS = Exponential(0.01, 100.0)
"""At its end every group whose largest entry exceeds 1.2 % of the row's rms is 2:4 by the prox itself."""

PENALTIES = Exponential(0.01, 1.0)
"""ADMM's rho, relative to the mean energy of an input: from "follow the loss" to "agree with the sparse copy"."""


BLOCK_STEPS, BLOCK_SWEEPS = 1, 0
"""Steps of Dykstra's splitting and sweeps of descent in each prox of 4 x 4 blocks: more of them cost time and,
measured on layers whose best mask is known, end no closer to it."""


def _scaled(weight: Tensor, moments: Tensor, damping: float, *, by_input: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``(Z, H in Z's coordinates, s)``; without ``by_input`` one scale for all inputs, their rms together."""
    scale = input_scale(moments)
    if not by_input:
        scale = scale.square().mean().sqrt().expand_as(scale)
    return weight * scale, regularized(moments, damping) / (scale.unsqueeze(1) * scale), scale


def _unit(dense: Tensor, dim: Dim) -> Tensor:
    """1 / rms of each row, or of the whole weight where groups span rows; 0 for a row of zeros."""
    by_row = isinstance(dim, int) and dim % 2 == 1
    mean = dense.square().mean(1, keepdim=True) if by_row else dense.square().mean().reshape(1, 1)
    return torch.where(mean > 0, mean, torch.inf).rsqrt()


def _prox(weight: Tensor, strength: Tensor, dim: Dim, out: Tensor) -> None:
    """The prox into ``out``; for blocks with fewer inner steps than by default, as the outer ones go on from there."""
    if isinstance(dim, int):
        prox_24(weight, strength, dim=dim, out=out)
    else:
        prox_block(weight, strength, dims=dim, out=out, steps=BLOCK_STEPS, sweeps=BLOCK_SWEEPS)


def largest_eigenvalue(moments: Tensor, iterations: int = 30) -> Tensor:
    """The largest eigenvalue of a positive semi-definite matrix by power iteration, plus 2 % (0-dim).

    The iteration approaches from below; the margin keeps a gradient step of its inverse from diverging.
    """
    vector = moments.sum(1) + moments.diagonal()
    for _ in range(iterations):
        vector = moments @ (vector / torch.linalg.vector_norm(vector).clamp_min(1e-30))
    return 1.02 * torch.linalg.vector_norm(vector)


def prox_gradient(
    weight: Tensor,
    moments: Tensor,
    *,
    dim: Dim = -1,
    steps: int = 400,
    momentum: float = 0.0,
    damping: float = 1e-3,
) -> Tensor:
    """Proximal gradient descent from the dense weight, ``steps`` steps, strength growing along ``STRENGTHS``.

    Args:
        weight: (out_features, in_features), float32 or float64.
        moments: (in_features, in_features), same dtype.
        dim: the dimension along which the groups of four lie, or a pair for 4 x 4 blocks.
        momentum: share of the last step that is repeated before the gradient is taken; 0.9 lowers the loss at no cost.
        damping: added to the diagonal of ``moments``, relative to each entry.

    Returns:
        a new weight; all but a few groups are 2:4.
    """
    dense, moments, scale = _scaled(weight, moments, damping)
    step_matrix = moments / -largest_eigenvalue(moments)
    z, last, strength, unit = dense.clone(), dense.clone(), torch.zeros_like(_unit(dense, dim)), _unit(dense, dim)

    def step() -> None:
        ahead = torch.lerp(last, z, 1 + momentum)
        last.copy_(z)
        _prox(torch.addmm(ahead, ahead - dense, step_matrix), strength, dim, z)

    run = Replayed(step, dense.device)
    for number in range(steps):
        torch.mul(unit, STRENGTHS(number / max(1, steps - 1)), out=strength)
        run()
    return z / scale


def prox_splitting(
    weight: Tensor,
    moments: Tensor,
    *,
    dim: Dim = -1,
    steps: int = 200,
    levels: int = 20,
    damping: float = 1e-3,
    strengths: Schedule = STRENGTHS,
    by_input: bool = True,
    name: str = "layer",
) -> Tensor:
    """Douglas-Rachford splitting (ADMM) of local loss and penalty, ``steps`` steps, strength and rho growing.

    One step, with ``Z0`` the dense weight and ``U`` the running disagreement::

        V = argmin 1/2 tr((V - Z0) H (V - Z0)^T) + rho/2 ||V - Z + U||^2
        Z = prox(V + U, strength);   U = U + V - Z

    Args:
        weight, moments, dim, damping: as for :func:`prox_gradient`.
        levels: how many values rho takes; each needs one inverse of an (in_features, in_features) matrix.
        strengths: of the prox over the steps, in units of 1 / rms of the scaled rows.
        by_input: measure each weight by the rms of its own input, as above; False measures all alike.
        name: for error messages.

    Returns:
        the last ``Z``, a new weight; all but a few groups are 2:4.
    """
    dense, moments, scale = _scaled(weight, moments, damping, by_input=by_input)
    levels = max(1, min(levels, steps))
    z, disagreement = dense.clone(), torch.zeros_like(dense)
    inverse, base = torch.empty_like(moments), torch.empty_like(dense)
    strength, unit = torch.zeros_like(_unit(dense, dim)), _unit(dense, dim)

    def step() -> None:
        disagreement.add_(torch.addmm(base, z - disagreement, inverse))
        _prox(disagreement, strength, dim, z)
        disagreement.sub_(z)

    run = Replayed(step, dense.device)
    pulled = dense @ moments
    last_rho = None
    rhos = [PENALTIES(level / max(1, levels - 1)) for level in range(levels)]
    inverses = shifted_inverses(moments, rhos, name=name)
    for level, (rho, found) in enumerate(zip(rhos, inverses, strict=True)):
        inverse.copy_(found)
        torch.mm(pulled, inverse, out=base)
        inverse.mul_(rho)
        if last_rho is not None:
            # U is the multiplier over rho; the multiplier is what carries over.
            disagreement.mul_(last_rho / rho)
        last_rho = rho
        for number in range(level * steps // levels, (level + 1) * steps // levels):
            torch.mul(unit, strengths(number / max(1, steps - 1)), out=strength)
            run()
    return z / scale
