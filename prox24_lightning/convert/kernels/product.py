"""The type of a prepared product with a packed weight, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(inputs, packed buffer, dense weight or None, bias or None) -> ``inputs @ weight.t() + bias``.

``inputs`` is (tokens, padded in_features) in 16 bits, contiguous and 16-byte aligned, not padded where the weight has 8
bits; the buffer is one of :mod:`~prox24_lightning.convert.kernels.packed_buffer` or, for a weight of 8 bits, of
:mod:`~prox24_lightning.convert.kernels.rounded_buffer`; the dense weight is int16 (out_features, in_features), the bits
of the 16-bit weight; bias is (out_features,) in any floating dtype; the result is (tokens, out_features). Kernels for
which :func:`~prox24_lightning.convert.kernels.registry.takes_any_shape` is true take (..., in_features) as well.
Each kernel's ``prepare(config, dtype, shape, tokens, device, form)`` makes one for a shape and a number of tokens.
"""


def cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias in ``dtype``; None stays None."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
