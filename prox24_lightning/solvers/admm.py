"""ADMM with the exact prox: the layer-wise solver behind ``method="prox"``.

It solves arXiv 2501.18015's problem, the local squared loss plus the 2:4 penalty, while the strength of the penalty
grows. The loss is minimised exactly in every step, through ``(H + rho I)^-1``, so every direction moves at once;
:mod:`~prox24_lightning.solvers.proximal_gradient` is the paper's own way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.schedules import Exponential, Schedule
from prox24_lightning.solvers.linear_algebra.inverses import shifted_inverses
from prox24_lightning.solvers.prox_step import STRENGTHS, apply_prox, inverse_rms, scale_inputs
from prox24_lightning.utils.cuda_graphs import GraphedStep
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
        rhos: over the levels.
    """

    steps: int
    levels: int
    strengths: Schedule
    rhos: Schedule


PATHS = {
    "full": Path(200, 20, STRENGTHS, RHOS),
    "short": Path(150, 15, Exponential(0.1, 100.0), Exponential(0.0316, 1.0)),
}
"""The short path leaves out the first quarter, in which hardly a group becomes 2:4 and each prox costs the most."""


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
