"""The type of a prepared product with a packed weight, the same for every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(inputs, packed buffer, dense weight or None, bias or None) -> ``inputs @ weight.t() + bias``.

``inputs`` is (tokens, padded in_features), contiguous and 16-byte aligned; the buffer is one of
:mod:`~prox24_lightning.convert.kernels.packed_buffer`; the dense weight is int16 (out_features, in_features), the bits
of the 16-bit weight; bias is (out_features,) in any floating dtype; the result is (tokens, out_features).
Each kernel's ``prepare(config, dtype, shape, tokens, device)`` makes one for a shape and a number of tokens.
"""


def cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias in ``dtype``; None stays None."""
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)
