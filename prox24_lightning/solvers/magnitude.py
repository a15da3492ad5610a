"""Magnitude pruning: keep the two largest of every four weights."""

from __future__ import annotations

from torch import Tensor

from prox24_lightning.mask import mask_24
from prox24_lightning.weights.groups import Dim


def magnitude(weight: Tensor, *, dim: Dim = -1) -> Tensor:
    """Return the bool mask of the two largest magnitudes in every group of four.

    Args:
        weight: (out_features, in_features).
        dim: the dimension along which the groups lie, or a pair for 4 x 4 blocks.
    """
    return mask_24(weight, dim=dim)
