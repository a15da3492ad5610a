"""What the kernels of this folder compute, in plain torch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import unpack_24
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.product import cast_bias
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.weights.rounding import RoundedForm


def linear(
    inputs: Tensor,
    buffer: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    form: RoundedForm | None = None,
) -> Tensor:
    """Return ``inputs @ weight.t() + bias`` for a packed weight; if that has 8 bits, the tokens are rounded as it is.

    Args:
        inputs: (tokens, in_features or more), in ``dtype``; what exceeds ``in_features`` is padding.
        buffer: of :mod:`~prox24_lightning.convert.kernels.packed_buffer`, or
            :mod:`~prox24_lightning.convert.kernels.rounded_buffer`.
        bias: (out_features,) or None.
        dtype: float16 or bfloat16.
        shape: (out_features, in_features).
        form: of a weight of 8 bits; None for one in ``dtype``.

    Returns:
        (tokens, out_features) in ``dtype``; the sums of a weight of 8 bits are float32.
    """
    inputs = inputs[:, : shape[1]]
    if form is None:
        return F.linear(inputs, expand(buffer, shape, dtype), cast_bias(bias, dtype))
    rounded = round_tokens(inputs, form, rounded_buffer.input_scale(buffer))
    weight = expand(buffer, shape, torch.float32, form)
    sums = F.linear(rounded.values.float() * rounded.scales.unsqueeze(-1), weight, cast_bias(bias, torch.float32))
    return sums.to(dtype)


def expand(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype, form: RoundedForm | None = None) -> Tensor:
    """Return the dense (out_features, in_features) weight of a packed buffer, exactly."""
    if form is None:
        return unpack_24(packed_buffer.from_buffer(buffer, shape, dtype))
    return unpack_24(rounded_buffer.from_buffer(buffer, shape, form, dtype))
