"""Multiply with torch's own cuSPARSELt operator, which makes a plan at every call (about 600 us of host work)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prox24_lightning.convert.kernels.cusparselt.bindings import pad_tokens
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.weights.rounding import RoundedForm


def prepare(
    config: Sequence[int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> Product:
    """Return a product on ``torch._cslt_sparse_mm``, of 16 bits only; ``config`` is empty."""

    def product(inputs: Tensor, buffer: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        packed = buffer.view(dtype)
        result = torch._cslt_sparse_mm(packed, pad_tokens(inputs, tokens).t(), transpose_result=True)
        result = result[:tokens, : shape[0]].contiguous()
        return result if bias is None else result.add_(bias.to(dtype))

    return product
