"""Wanda (arXiv 2306.11695): keep the two weights of every four with the largest magnitude times rms of their input."""

from __future__ import annotations

from torch import Tensor

from prox24_lightning.mask import mask_24
from prox24_lightning.solvers.loss import input_scale
from prox24_lightning.weights.groups import Dim


def wanda(weight: Tensor, hessian: Tensor, *, dim: Dim = -1) -> Tensor:
    """Return the bool mask of the two largest ``|W_ij| sqrt(H_jj)`` in every group of four.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features); only its diagonal counts. Where all of it is zero, magnitudes decide.
        dim: the dimension along which the groups lie, or a pair for 4 x 4 blocks.
    """
    return mask_24(weight, dim=dim, scale=input_scale(hessian))
