"""The mask that a weight would get now, as one byte a group: to count changes, and as a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.mask.transposable import best_patterns, relative_squares
from prox24_lightning.weights.blocks_4x4 import from_blocks, to_blocks
from prox24_lightning.weights.groups import Dim, group_dims, to_groups


def top_two_code(score: Tensor) -> Tensor:
    """Return which two of every four entries are the largest, as one byte a group: bit i is set if entry i is.

    The rule is that of :func:`~prox24_lightning.mask.mask_24`, among equals the earlier position, without its check for
    NaN, which would wait for the device.

    Args:
        score: ``(4, groups)``, non-negative.

    Returns:
        uint8 ``(groups,)``.
    """
    beats = {(j, i): score[j] > score[i] for i in range(4) for j in range(i + 1, 4)}
    beats |= {(i, j): ~later for (j, i), later in beats.items()}
    code = torch.zeros(score.shape[1:], dtype=torch.uint8, device=score.device)
    for i in range(4):
        a, b, c = (beats[j, i] for j in range(4) if j != i)
        kept = ~((a & b) | (c & (a | b)))  # beaten by fewer than two of the other three
        code |= kept.view(torch.uint8) << i
    return code


def flipped_entries(before: Tensor, after: Tensor) -> Tensor:
    """Return the number of mask entries in which two results of :func:`top_two_code` differ: float32, 0-dim."""
    changed = before ^ after
    pairs = (changed & 5) + ((changed >> 1) & 5)
    return ((pairs & 3) + (pairs >> 2)).sum(dtype=torch.float32)


def mask_picture(
    weight: Tensor, *, dim: Dim = -1, scale: Tensor | None = None, rows: int = 48, columns: int = 48
) -> Tensor:
    """Return a picture of the corner of a weight on its way to 2:4, groups running from left to right.

    With a pair of dimensions (4 x 4 blocks) the first runs downwards and the second from left to right.

    Returns:
        uint8, at most ``(rows, columns)``: 0 where the weight is zero, 1 where it is not and the mask would prune
        it now, 2 where it is not and the mask keeps it.
    """
    if not isinstance(dim, int):
        order = group_dims(weight.shape, dim)
        corner = (Ellipsis, slice(rows - rows % 4), slice(columns - columns % 4))
        part = weight.detach().movedim(order, (-2, -1))[corner]
        score = part.float()
        if scale is not None:
            score = score * scale.detach().expand(weight.shape).movedim(order, (-2, -1))[corner]
        part, score = (values.flatten(0, -3)[0] if values.dim() > 2 else values for values in (part, score))
        keep = from_blocks(best_patterns(relative_squares(to_blocks(score))), score.shape)
        return ((part != 0) * (1 + keep.to(torch.uint8))).to(torch.uint8)
    values = to_groups(weight.detach(), dim)[..., : columns // 4, :]
    score = values.float()
    if scale is not None:
        score = score * to_groups(scale.detach().expand(weight.shape), dim)[..., : columns // 4, :]
    values, score = (part.flatten(0, -3)[:rows] if part.dim() > 2 else part[None] for part in (values, score))
    code = top_two_code(score.movedim(-1, 0).flatten(1).square()).view(values.shape[:-1])
    kept = (code.unsqueeze(-1) >> torch.arange(4, dtype=torch.uint8, device=code.device)) & 1
    return ((values != 0) * (1 + kept)).to(torch.uint8).flatten(1)
