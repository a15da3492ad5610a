"""Multiply with the dense weight that the layer keeps beside the packed one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.kernels.product import Product, cast_bias
from prox24_lightning.weights.rounding import RoundedForm


def prepare(
    config: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> Product:
    """Return a product that needs the dense weight and ignores the packed one.

    Its inputs are (tokens, in_features), not padded. ``config`` is empty; the packed weight may have any ``form``.
    """

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            raise RuntimeError("this layer keeps no dense weight: convert it with keep_dense=True")
        return F.linear(inputs, weight.view(dtype), cast_bias(bias, dtype))

    return product
