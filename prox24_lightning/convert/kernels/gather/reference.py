"""Gather the kept entries of a weight with a frozen mask into packed form, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(weight: Tensor, indices: Tensor, values: Tensor, transposed: bool) -> None:
    """Write the kept entries of ``weight``, or of its transpose, into ``values``.

    Args:
        weight: (out_features, in_features), contiguous.
        indices: uint8 (rows, width / 4) of the weight or its transpose, as
            :class:`~prox24_lightning.convert.format.packed_weight.PackedWeight` has them.
        values: (rows, width), any floating dtype; ``width`` is half the columns.
        transposed: whether ``indices`` and ``values`` are those of the transpose.
    """
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=indices.device)
    kept = (indices[..., None] >> shifts & 3).long().view(len(indices), -1)
    groups = 4 * (torch.arange(kept.shape[1], device=indices.device) // 2)
    values.copy_((weight.t() if transposed else weight).gather(1, groups + kept))
