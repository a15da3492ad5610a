"""ADMM with the exact prox: the layer-wise solver behind ``method="prox"``.

It solves arXiv 2501.18015's problem, the local squared loss plus the 2:4 penalty, while the strength of the penalty
grows. The loss is minimised exactly in every step, through ``(H + rho I)^-1``, so every direction moves at once;
:mod:`~prox24_lightning.solvers.proximal_gradient` is the paper's own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prox24_lightning.schedules import Exponential, Schedule
from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.solvers.linear_algebra.inverses import shifted_inverses
from prox24_lightning.solvers.prox_step import STRENGTHS, apply_prox, inverse_rms, scale_inputs
from prox24_lightning.utils.devices.cuda_graphs import GraphedStep
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.groups import Dim

RHOS = Exponential(0.01, 1.0)
"""ADMM's rho, relative to the mean squared input: from "follow the loss" to "agree with the sparse copy"."""


@dataclass(frozen=True)
class Path:
    """How strength and rho grow.

    Attributes:
        steps: ADMM steps.
        levels: how many values rho takes.
        strengths: of the prox over the steps, in units of 1 / rms of the scaled rows.
        rhos: over the levels, relative to the mean squared input.
        fitted: whether ``steps`` and ``rhos`` are for uncorrelated inputs; :func:`fitted_path` adapts them.
    """

    steps: int
    levels: int
    strengths: Schedule
    rhos: Exponential
    fitted: bool = False


PATHS = {
    "full": Path(200, 20, STRENGTHS, RHOS),
    "short": Path(150, 5, Exponential(0.15, 2.0), Exponential(0.3, 3.0), fitted=True),
}
"""The short path begins where the first groups become 2:4, and ends where hardly one changes: the refinement then finds
the values sooner."""

FLAT, LEAST = 0.2, 0.4
"""The typical curvature from which on a fitted path takes all of its steps, and the share that it always takes."""


def fitted_path(path: Path, hessian: Tensor, damping: float, *, name: str = "layer") -> Path:
    """Return ``path`` in units of the layer's typical curvature: the geometric mean of the eigenvalues of ``H``.

    Where inputs are correlated (neighbouring pixels are), a few eigenvalues hold most of the trace, and the others lie
    far below their mean. A rho of the size of the mean holds ``V`` to the sparse copy in nearly all directions, however
    little they matter to the loss. A rho of the size of most eigenvalues balances the two, and comes closer to the
    optimum in fewer steps: ``steps`` times the 0.4th power of the curvature over :data:`FLAT`.

    Args:
        path: for uncorrelated inputs, where the typical curvature is 1.
        hessian: (in_features, in_features), float32 or float64.
        damping: as in :func:`admm`.
        name: for error messages.
    """
    curvature = typical_curvature(hessian, damping, name=name)
    share = min(1.0, max(LEAST, (curvature / FLAT) ** 0.4))
    rhos = Exponential(curvature * path.rhos.start, curvature * path.rhos.end)
    return replace(path, steps=math.ceil(share * path.steps), rhos=rhos, fitted=False)


def typical_curvature(hessian: Tensor, damping: float, *, name: str = "layer") -> float:
    """Return the geometric mean of the eigenvalues of ``H`` scaled to a unit diagonal, but for inputs that never fire.

    By Cholesky's factor, whose squared diagonal has their product: 1 for uncorrelated inputs, near ``damping`` for
    inputs that are nearly all the same.
    """
    _, scaled, _ = scale_inputs(hessian, hessian, damping)
    squares = cholesky(scaled, name=name).diagonal().square()
    return float(torch.exp((squares.log() * scaled.diagonal()).sum() / scaled.diagonal().sum()))


def admm(
    weight: Tensor,
    hessian: Tensor,
    *,
    dim: Dim = -1,
    steps: int = PATHS["full"].steps,
    levels: int = PATHS["full"].levels,
    damping: float = 1e-3,
    strengths: Schedule = STRENGTHS,
    rhos: Schedule = RHOS,
    by_input: bool = True,
    name: str = "layer",
    shared: bool = False,
) -> Tensor:
    """Run ADMM (Douglas-Rachford splitting) of local loss and penalty while the strength and rho grow.

    One step, with ``Z0`` the dense weight and ``U`` the scaled multiplier::

        V = argmin 1/2 tr((V - Z0) H (V - Z0)^T) + rho/2 ||V - Z + U||^2
        Z = prox(V + U, strength);   U = U + V - Z

    Args:
        weight: (out_features, in_features), float32 or float64.
        hessian: (in_features, in_features), same dtype.
        dim: the dimension along which the groups of four lie, or a pair for 4 x 4 blocks.
        steps: ADMM steps.
        levels: how many values rho takes; each needs one inverse of an (in_features, in_features) matrix.
        damping: added to the diagonal of ``hessian``, relative to each entry.
        strengths: of the prox over the steps, in units of 1 / rms of the scaled rows.
        rhos: over the levels.
        by_input: scale each weight by the rms of its own input; False scales all alike.
        name: for error messages.
        shared: other ranks solve other rows with the same Hessian: its inverses are shared out.

    Returns:
        the last ``Z``, a new weight; all but a few groups are 2:4.
    """
    dense, hessian, scale = scale_inputs(weight, hessian, damping, by_input=by_input)
    levels = max(1, min(levels, steps))
    z, multiplier = dense.clone(), torch.zeros_like(dense)
    inverse, base = torch.empty_like(hessian), torch.empty_like(dense)
    unit = inverse_rms(dense, dim)
    strength = torch.zeros_like(unit)

    def step() -> None:
        multiplier.add_(torch.addmm(base, z - multiplier, inverse))
        apply_prox(multiplier, strength, dim, z)
        multiplier.sub_(z)

    run = GraphedStep(step, dense.device)
    pulled = dense @ hessian
    last_rho = None
    values = [rhos(level / max(1, levels - 1)) for level in range(levels)]
    inverses = shifted_inverses(hessian, values, name=name, shared=shared)
    for level, (rho, found) in enumerate(zip(values, inverses, strict=True)):
        inverse.copy_(found)
        torch.mm(pulled, inverse, out=base)
        inverse.mul_(rho)
        if last_rho is not None:
            # U is the multiplier divided by rho; the multiplier itself carries over.
            multiplier.mul_(last_rho / rho)
        last_rho = rho
        for number in range(level * steps // levels, (level + 1) * steps // levels):
            torch.mul(unit, strengths(number / max(1, steps - 1)), out=strength)
            run()
            between_pieces()
    return z / scale
