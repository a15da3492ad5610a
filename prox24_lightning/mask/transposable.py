"""The best transposable mask: two of four in every row and in every column of each 4 x 4 block."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor, library

from prox24_lightning.weights.blocks_4x4 import BLOCK_DIMS, from_blocks, to_blocks
from prox24_lightning.weights.groups import check_scale, check_weight

CHUNK = 1 << 16
"""Blocks a matrix product: 90 float64 sums each, 47 MB."""

RESOLUTION = 40
"""Scores are rounded to 2^-40 of the largest of their block, so that every sum of eight of them is exact in float64."""


@cache
def transposable_patterns(device: torch.device, at_most: bool = False) -> Tensor:
    """Return all 90 4 x 4 masks with two ones in every row and column: float64 (90, 4, 4).

    Those that keep early positions come first.

    With ``at_most`` the 96 of seven entries follow: a row and a column that meet in their only entry cannot take
    an eighth. These 186 are all maximal masks with at most two ones in every row and column.
    """
    rows = [[float(entry in kept) for entry in range(4)] for size in (2, 1) for kept in combinations(range(4), size)]
    masks = torch.tensor(list(product(rows, repeat=4)), dtype=torch.float64, device=device)
    total, widest = masks.sum((1, 2)), masks.sum(1).amax(1)
    full = masks[(total == 8) & (widest == 2)]
    if not at_most:
        return full
    seven = masks[(total == 7) & (widest == 2)]
    short = torch.einsum("ni,nj,nij->n", (seven.sum(2) == 1).double(), (seven.sum(1) == 1).double(), seven)
    return torch.cat([full, seven[short == 1]])


def best_patterns(score: Tensor, at_most: bool = False) -> Tensor:
    """Return the :func:`transposable_patterns` with the largest sum of scores: any score, not only squares.

    Ties, up to 2^-40 of a block's largest score, go to the earlier pattern. As sums are exact, the order in which a
    device adds does not matter: every device and every rank gives the same mask.

    Args:
        score: (4, 4, blocks), non-negative, without NaN; infinite counts as the largest number.

    Returns:
        bool (4, 4, blocks).
    """
    patterns = transposable_patterns(score.device, at_most)
    table = patterns.flatten(1)
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for begin in range(0, score.shape[2], CHUNK):
        part = score[:, :, begin : begin + CHUNK].double().flatten(0, 1)
        part = part.clamp_max(torch.finfo(torch.float64).max)
        largest = part.amax(0)
        whole = torch.round(part / torch.where(largest > 0, largest, 1.0) * 2.0**RESOLUTION)
        best = (table @ whole).argmax(0)
        keep[:, :, begin : begin + CHUNK] = patterns.bool()[best].movedim(0, -1)
    return keep


def transposable_mask(weight: Tensor, *, dims: tuple[int, int] = BLOCK_DIMS, scale: Tensor | None = None) -> Tensor:
    """Return the mask of two of four in every row and column of each 4 x 4 block that keeps most of the squares.

    It solves ``argmin_m ||scale * (weight - m * weight)||^2`` over these 90 masks exactly, by trying all: by
    magnitude, or, with ``scale``, in the metric of the layer's inputs. Both the forward product and the one for the
    gradient of the inputs then run on sparse tensor cores. A mask of seven entries can retain more than the best
    of eight, but leaves one weight less to fine-tune; masks for training have eight.

    Args:
        weight: any floating dtype, any strides.
        dims: the two dimensions that are cut; their sizes divide by 4.
        scale: positive, broadcasts to ``weight``; None is one everywhere.

    Returns:
        bool tensor of the shape of ``weight``, exactly two True in every row and column of a block. Deterministic
        (:func:`best_patterns`).

    Raises:
        ValueError: if a size does not divide by 4 or ``weight`` holds NaN.
    """
    check_weight(weight, "transposable_mask", vmap="matrices")
    if torch.compiler.is_compiling():
        return _compiled_transposable_mask(weight.detach(), list(dims), scale)
    blocks = to_blocks(scaled(weight, scale), dims).abs()
    refuse_nan(blocks, weight.shape, "transposable")
    return from_blocks(best_patterns(relative_squares(blocks)), weight.shape, dims)


@library.custom_op(
    "prox24_lightning::transposable_mask",
    mutates_args=(),
    schema="(Tensor weight, int[] dims, Tensor? scale) -> Tensor",
)
def _compiled_transposable_mask(weight: Tensor, dims: list[int], scale: Tensor | None) -> Tensor:
    """``transposable_mask`` as torch.compile sees it: one operation, whose check for NaN happens when it runs."""
    return transposable_mask(weight, dims=(dims[0], dims[1]), scale=scale)


@_compiled_transposable_mask.register_fake
def _(weight: Tensor, dims: list[int], scale: Tensor | None) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``weight * scale`` for scores, apart from autograd; 8 bits as float32, as torch compares none of these.

    Raises:
        TypeError, ValueError: for a scale that does not broadcast to the weight.
    """
    check_scale(scale, weight)
    values = weight.detach()
    values = values.float() if values.is_floating_point() and values.itemsize == 1 else values
    return values if scale is None else values * scale


def refuse_nan(scores: Tensor, shape: torch.Size, kind: str) -> None:
    """Refuse scores with NaN.

    Raises:
        ValueError: if some of the ``scores`` for a mask of this ``kind`` are NaN.
    """
    if torch.isnan(scores).any():
        raise ValueError(
            f"cannot choose a {kind} mask: {int(torch.isnan(scores).sum())} scores of a weight of shape {tuple(shape)} "
            "are NaN; look for the step at which the loss stopped being finite"
        )


def relative_squares(blocks: Tensor) -> Tensor:
    """Return squares of (4, 4, blocks) over the largest of each block, in float64: no overflow, no underflow of what
    counts."""
    values = blocks.double().abs().clamp_max(torch.finfo(torch.float64).max)
    largest = values.amax((0, 1))
    return (values / torch.where(largest > 0, largest, 1.0)).square()
