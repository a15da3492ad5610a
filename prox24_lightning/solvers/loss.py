"""The local squared loss of one layer, and the checks every solver starts with.

A layer ``y = W x`` is replaced by a sparse ``V`` whose outputs on the calibration inputs are as close as possible:

    L(V) = 1/2 tr((V - W) H (V - W)^T),    H = X^T X / tokens.

This is the objective of arXiv 2501.18015. ``V`` and ``W`` are ``(out_features, in_features)``, ``H`` is
``(in_features, in_features)``; the loss has the units of the layer's output squared, a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.calibration.statistics.input_second_moment import SCALE_FLOOR


def row_losses(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """Return the local loss of every row, (out_features,)."""
    difference = weight - dense
    return 0.5 * ((difference @ hessian) * difference).sum(1)


def local_loss(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """Return ``1/2 tr((weight - dense) H (weight - dense)^T)`` as a 0-dim tensor."""
    return row_losses(weight, dense, hessian).sum()


def relative_loss(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """Return :func:`local_loss` over that of the all-zero weight: the lost share of the output's squared norm.

    It is 0 when the dense output itself is zero (a layer whose inputs never fire).
    """
    whole = local_loss(torch.zeros_like(dense), dense, hessian)
    lost = local_loss(weight, dense, hessian)
    return float(lost / whole) if whole > 0 else 0.0


def check_layer(weight: Tensor, hessian: Tensor, name: str = "layer") -> None:
    """Raise for a layer that no solver can prune.

    Raises:
        ValueError: for a weight that is not a matrix, a Hessian of another size, or values that are not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"{name}: the layer-wise solver takes a matrix, got a weight of shape {tuple(weight.shape)}")
    size = weight.shape[1]
    if hessian.shape != (size, size):
        raise ValueError(
            f"{name}: a Hessian of shape {tuple(hessian.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}; it must be ({size}, {size})"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight holds values that are not finite; load a sound checkpoint")
    if not torch.isfinite(hessian).all():
        raise ValueError(
            f"{name}: the layer's inputs hold values that are not finite, or overflow when squared; look for the batch "
            "or the layer before it that produces them, or leave this layer dense with skip="
        )


def input_scale(hessian: Tensor) -> Tensor:
    """Return the rms of each input, (in_features,), at least ``SCALE_FLOOR`` times the layer's; ones if all are 0."""
    mean_square = hessian.diagonal().clamp_min(0)
    mean_square = torch.where(mean_square.mean() > 0, mean_square, 1.0)
    return mean_square.clamp_min(SCALE_FLOOR**2 * mean_square.mean()).sqrt()


def regularized(hessian: Tensor, damping: float) -> Tensor:
    """Return ``H + damping * diag(s^2)`` with ``s`` of :func:`input_scale`: positive definite for any ``damping > 0``.

    The damping is relative to each input's own mean square, so that one input a thousand times stronger than the rest
    (common in language models) does not drown the others. An all-zero Hessian becomes ``damping * I``: weights then
    count by magnitude.
    """
    result = hessian.clone()
    result.diagonal().add_(damping * input_scale(hessian).square())
    return result
