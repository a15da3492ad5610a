"""The 2:4 proximal operator, its penalty, and the strength at which a group becomes 2:4.

``prox_24`` runs one fused Triton kernel where it can (contiguous float32, bfloat16 and float16 weights on a CUDA GPU
of compute capability 8.0 or newer) and batched torch operations elsewhere; :func:`prox_path` says which path runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.batched import prox_24_batched
from prox24_lightning.prox.critical import critical_strength_24
from prox24_lightning.prox.paths import prox_path
from prox24_lightning.prox.penalty import penalty_24
from prox24_lightning.prox.reference import prox_24_reference

__all__ = ["critical_strength_24", "penalty_24", "prox_24", "prox_24_reference", "prox_path"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prox_24(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dim: int = -1,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Solve ``argmin_w 1/2 ||w - weight||^2 + strength * r(w)`` exactly for every group of four.

    ``r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|`` is zero exactly where the group is 2:4 (arXiv
    2501.18015; the paper's alternating minimisation can miss the minimiser, the scalar equations used here
    cannot). With ``scale`` the distance is measured as ``||scale * (w - weight)||`` and the penalty is that of
    ``scale * w``: the result is ``prox(weight * scale, strength) / scale``. Not recorded by autograd.

    Args:
        weight: float16, bfloat16 (both computed in float32 and rounded once), float32 or float64; any shape
            whose ``dim`` divides by 4, any strides. ``(out_features, in_features)`` with ``dim=-1`` for a linear layer.
        strength: lambda >= 0, units 1/weight (1/(weight * scale) with ``scale``), any step size multiplied in: a
            float, or a tensor that broadcasts against :func:`~prox24_lightning.groups.group_shape` (``(out, 1)``: one a
            row). 0 returns the weight, infinity keeps the two largest of each group.
        dim: the dimension along which the groups lie.
        scale: positive and finite, broadcasts to ``weight``, for instance the root mean square of each input.
        out: where to write, of the shape, dtype and device of ``weight``; ``weight`` itself works in place.

    Returns:
        ``out``, or a new tensor like ``weight``. Kept entries of a group that ends with two are bit for bit those
        of ``weight``; pruned entries are +0.0. Among equal magnitudes the earlier position is kept.
        A group that holds NaN comes back as NaN; one with an infinite entry keeps its two largest at any strength > 0.

    Raises:
        ValueError: for a dtype that is not one of the four, a bad ``dim``, a ``strength`` or ``scale`` that does not
            broadcast, an ``out`` that does not match, and a negative or NaN strength or a scale that is not
            positive. Values of CUDA tensors are not looked at, as that would wait for the device: where
            they are bad the group comes back as NaN.
    """
    if weight.dtype not in _DTYPES:
        raise ValueError(f"prox_24 needs a float16, bfloat16, float32 or float64 weight, got {weight.dtype}")
    shape = group_shape(weight.shape, resolve_group_dim(weight.shape, dim))
    _check_strength(strength, shape, weight)
    if scale is not None:
        _check_scale(scale, weight)
    if out is not None and (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"out has shape {tuple(out.shape)}, {out.dtype} on {out.device}, but the weight has shape "
            f"{tuple(weight.shape)}, {weight.dtype} on {weight.device}; pass a tensor like the weight"
        )
    with torch.no_grad():
        if prox_path(weight) == "triton" and (out is None or out.is_contiguous()):
            from prox24_lightning.prox.triton_kernel import prox_24_triton

            return prox_24_triton(weight, strength, dim=dim, scale=scale, out=out)
        return prox_24_batched(weight, strength, dim=dim, scale=scale, out=out)


def _check_strength(strength: float | Tensor, shape: tuple[int, ...], weight: Tensor) -> None:
    if isinstance(strength, Tensor):
        if not _broadcasts(strength, shape):
            raise ValueError(
                f"strength of shape {tuple(strength.shape)} does not broadcast against the groups' shape {shape} of a "
                f"weight of shape {tuple(weight.shape)}; use (rows, 1) for one strength a row"
            )
        if strength.device.type == "cpu" and not bool((strength >= 0).all()):
            raise ValueError(f"strength must be >= 0, but its smallest entry is {strength.min().item()}")
    elif not strength >= 0:
        raise ValueError(f"strength={strength} must be >= 0")


def _check_scale(scale: Tensor, weight: Tensor) -> None:
    if not _broadcasts(scale, weight.shape):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not broadcast to the weight's shape {tuple(weight.shape)}; use "
            "(in_features,) for one value an input"
        )
    if scale.device.type == "cpu" and not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(
            f"scale must be positive and finite, but it ranges from {scale.min().item()} to {scale.max().item()}; "
            "clamp it away from zero (an input that is always zero has no scale)"
        )


def _broadcasts(tensor: Tensor, shape: tuple[int, ...] | torch.Size) -> bool:
    if tensor.dim() > len(shape):
        return False
    return all(a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(shape), strict=False))
