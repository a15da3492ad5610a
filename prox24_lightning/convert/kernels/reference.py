"""What the kernels of this folder compute, in plain torch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import unpack_24
from prox24_lightning.convert.kernels.packed_buffer import from_buffer
from prox24_lightning.convert.kernels.product import cast_bias


def linear(inputs: Tensor, buffer: Tensor, bias: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Return ``inputs @ weight.t() + bias`` for a packed weight.

    Args:
        inputs: (tokens, in_features or more), in ``dtype``; what exceeds ``in_features`` is padding.
        buffer: of :mod:`~prox24_lightning.convert.kernels.packed_buffer`.
        bias: (out_features,) or None.
        dtype: float16 or bfloat16.
        shape: (out_features, in_features).

    Returns:
        (tokens, out_features) in ``dtype``.
    """
    return F.linear(inputs[:, : shape[1]], expand(buffer, shape, dtype), cast_bias(bias, dtype))


def expand(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the dense (out_features, in_features) weight of a packed buffer, exactly."""
    return unpack_24(from_buffer(buffer, shape, dtype))
