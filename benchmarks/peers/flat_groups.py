"""All groups of four of a model in one tensor, so that a peer's step is a few large kernels and not thousands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prox24_lightning.weights.groups import from_groups, to_groups
from prox24_lightning.weights.selection import GroupedWeight


class FlatGroups:
    """Between tensors shaped like ``weights`` and one tensor (groups, 4)."""

    def __init__(self, weights: Sequence[GroupedWeight]) -> None:
        self.dims = [weight.dim for weight in weights]
        self.shapes = [to_groups(weight.parameter, weight.dim).shape for weight in weights]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of all of them as (groups, 4), in order."""
        parts = [to_groups(tensor, dim).reshape(-1, 4) for tensor, dim in zip(tensors, self.dims, strict=True)]
        return torch.cat(parts)

    def scatter(self, groups: Tensor) -> list[Tensor]:
        """Views of (groups, 4) in the shapes of the weights."""
        parts = groups.split([shape.numel() // 4 for shape in self.shapes])
        return [from_groups(part.view(s), dim) for part, s, dim in zip(parts, self.shapes, self.dims, strict=True)]
