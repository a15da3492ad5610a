"""Choose which two of every four weights stay."""

from __future__ import annotations

import torch
from torch import Tensor, library

from prox24_lightning.mask.transposable import refuse_nan, scaled, transposable_mask
from prox24_lightning.weights.groups import Dim, check_weight, from_groups, to_groups


def mask_24(weight: Tensor, *, dim: Dim = -1, scale: Tensor | None = None) -> Tensor:
    """Return the 2:4 mask that keeps the two largest scores ``|weight * scale|`` of every group of four.

    It solves ``argmin_m ||scale * (weight - m * weight)||^2`` over masks with exactly two ones a group: the
    Euclidean projection onto 2:4 without ``scale``, and the projection in the metric of the layer's inputs
    with it (Wanda's score, for ``scale`` the root mean square of each input).

    Args:
        weight: any floating dtype, any strides.
        dim: the dimension along which the groups lie; its size divides by 4. A pair asks for both at once: the
            :func:`~prox24_lightning.mask.transposable.transposable_mask` of 4 x 4 blocks.
        scale: positive, broadcasts to ``weight``; None is one everywhere.

    Returns:
        bool tensor of the shape of ``weight``, exactly two True in every group. Among equal scores the earlier
        position stays, so every device and every rank gives the same mask.

    Raises:
        ValueError: if the size along ``dim`` does not divide by 4 or ``weight`` holds NaN.
        TypeError: for what is not a tensor, and under ``torch.vmap``.
    """
    check_weight(weight, "mask_24")
    if not isinstance(dim, int):
        return transposable_mask(weight, dims=dim, scale=scale)
    if torch.compiler.is_compiling():
        return _compiled_mask_24(weight.detach(), dim, scale)
    score = to_groups(scaled(weight, scale), dim).abs()
    refuse_nan(score, weight.shape, "2:4")
    # Entry i stays if fewer than two entries beat it: j beats i when it is larger, or equal and earlier.
    # Six comparisons a group, no sort, and the tie rule is in the formula instead of in a sort's stability.
    entry = score.unbind(-1)
    beaten: list[Tensor | int] = [0, 0, 0, 0]
    for i in range(4):
        for j in range(i + 1, 4):
            later_wins = (entry[j] > entry[i]).to(torch.uint8)
            beaten[i] = beaten[i] + later_wins
            beaten[j] = beaten[j] + (1 - later_wins)
    keep = torch.stack([torch.as_tensor(count) < 2 for count in beaten], dim=-1)
    return from_groups(keep, dim)


@library.custom_op(
    "prox24_lightning::mask_24", mutates_args=(), schema="(Tensor weight, int dim, Tensor? scale) -> Tensor"
)
def _compiled_mask_24(weight: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    """``mask_24`` as torch.compile sees it: one operation, whose check for NaN happens when it runs."""
    return mask_24(weight, dim=dim, scale=scale).contiguous()


@_compiled_mask_24.register_fake
def _(weight: Tensor, dim: int, scale: Tensor | None) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
