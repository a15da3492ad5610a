"""What both proximal solvers share: scaled coordinates, growing strengths, and the prox of one step.

Both work on ``Z = V * s`` with ``s`` the rms of each input, for which ``H`` has a unit diagonal, and both use the exact
:func:`~prox24_lightning.prox.prox_24`. Strengths are in units of 1 / rms of the rows of ``Z``: each row has its own
rms, so the result of a row depends on no other row. Along ``dim=0``, where groups span rows, it is the rms of the whole
weight.

The prox of 4 x 4 blocks (a pair of dimensions) runs a short splitting of its own in every step. Two sparse copies, one
for the rows and one for the columns, need no such splitting, but end several times further from the optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.prox import prox_24, prox_block
from prox24_lightning.schedules import Exponential
from prox24_lightning.solvers.loss import input_scale, regularized
from prox24_lightning.weights.groups import Dim

STRENGTHS = Exponential(0.01, 100.0)
"""At its end the prox makes every group 2:4 whose largest entry exceeds 1.2 % of the row's rms."""

BLOCK_STEPS, BLOCK_SWEEPS = 1, 0
"""Steps of Dykstra's splitting and sweeps of descent in each prox of 4 x 4 blocks. More of them cost time and end no
closer to the optimum, measured on layers whose best mask is known."""


def scale_inputs(
    weight: Tensor, hessian: Tensor, damping: float, *, by_input: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(Z, H in Z's coordinates, s)``; without ``by_input`` one scale for all inputs, their joint rms."""
    scale = input_scale(hessian)
    if not by_input:
        scale = scale.square().mean().sqrt().expand_as(scale)
    return weight * scale, regularized(hessian, damping) / (scale.unsqueeze(1) * scale), scale


def inverse_rms(dense: Tensor, dim: Dim) -> Tensor:
    """Return 1 / rms of each row, or of the whole weight where groups span rows; 0 for a row of zeros."""
    by_row = isinstance(dim, int) and dim % 2 == 1
    mean = dense.square().mean(1, keepdim=True) if by_row else dense.square().mean().reshape(1, 1)
    return torch.where(mean > 0, mean, torch.inf).rsqrt()


def apply_prox(weight: Tensor, strength: Tensor, dim: Dim, out: Tensor) -> None:
    """Write the prox of ``weight`` into ``out``; 4 x 4 blocks take few inner steps, as the outer ones repeat them."""
    if isinstance(dim, int):
        prox_24(weight, strength, dim=dim, out=out)
    else:
        prox_block(weight, strength, dims=dim, out=out, steps=BLOCK_STEPS, sweeps=BLOCK_SWEEPS)
