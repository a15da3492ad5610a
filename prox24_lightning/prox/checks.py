"""Checks of the arguments that the functions of the prox share."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from prox24_lightning.weights.groups import broadcasts, check_scale

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_tensor(strength: float | Tensor, weight: Tensor) -> Tensor:
    """Return ``strength`` as a tensor on the device of ``weight``, in its computing dtype."""
    if isinstance(strength, Tensor):
        return strength
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.full((), strength, dtype=compute, device=weight.device)  # a fill: no wait for the device


def check_dtype(weight: Tensor) -> None:
    """Refuse a weight of a dtype that the prox does not compute with."""
    if weight.dtype not in _DTYPES:
        raise ValueError(f"prox_24 needs a float16, bfloat16, float32 or float64 weight, got {weight.dtype}")


def check_arguments(
    weight: Tensor, shape: tuple[int, ...], strength: float | Tensor, scale: Tensor | None, out: Tensor | None
) -> None:
    """Refuse a strength that does not broadcast against ``shape``, and a bad scale or ``out``."""
    if not isinstance(strength, (Real, Tensor)):
        kind = f"{type(strength).__module__}.{type(strength).__qualname__}"
        raise TypeError(f"strength takes a number or a torch.Tensor, got {kind}; use torch.as_tensor")
    _check_strength(strength, shape, weight)
    if scale is not None:
        _check_scale(scale, weight)
    if out is not None and (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"out has shape {tuple(out.shape)}, {out.dtype} on {out.device}, but the weight has shape "
            f"{tuple(weight.shape)}, {weight.dtype} on {weight.device}; pass a tensor like the weight"
        )


def _check_strength(strength: float | Tensor, shape: tuple[int, ...], weight: Tensor) -> None:
    if isinstance(strength, Tensor):
        if not broadcasts(strength, shape):
            raise ValueError(
                f"strength of shape {tuple(strength.shape)} does not broadcast against the groups' shape {shape} of a "
                f"weight of shape {tuple(weight.shape)}; use (rows, 1) for one strength a row"
            )
        if strength.device.type == "cpu" and not bool((strength >= 0).all()):
            raise ValueError(f"strength must be >= 0, but its smallest entry is {strength.min().item()}")
    elif not strength >= 0:
        raise ValueError(f"strength={strength} must be >= 0")


def _check_scale(scale: Tensor, weight: Tensor) -> None:
    check_scale(scale, weight)
    if scale.device.type == "cpu" and not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(
            f"scale must be positive and finite, but it ranges from {scale.min().item()} to {scale.max().item()}; "
            "clamp it away from zero (an input that is always zero has no scale)"
        )
