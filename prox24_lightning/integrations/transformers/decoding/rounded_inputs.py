"""Tokens rounded to 8 bits by what makes them, so that the product behind it need not: a norm, or SiLU times a product.

On a GPU each is one launch (:mod:`.rounding_kernel`), which adds the residual as well; elsewhere plain torch. Every
step is rounded to the model's dtype where transformers' own modules do so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding
from prox24_lightning.weights.rounding import round_tokens


def add_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, rounding: Rounding | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``rms_norm(residual + update) * weight``, the sum, and the former in 8 bits.

    Args:
        residual: (..., features), contiguous, float16 or bfloat16.
        update: of the same shape, contiguous; None adds nothing, and the sum is ``residual`` itself.
        weight: (features,) of the norm.
        epsilon: added to the mean square.
        rounding: None rounds nothing.

    Returns:
        normed, of the residual's shape and dtype; the sum; and the rounded tokens as
        :data:`~prox24_lightning.convert.kernels.round_tokens.kernel.RoundTokens` returns them, or None.
    """
    if residual.is_cuda:
        from prox24_lightning.integrations.transformers.decoding import rounding_kernel

        return rounding_kernel.add_norm(residual, update, weight, epsilon, rounding)
    total = residual if update is None else residual + update
    wide = total.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = weight * unit.to(total.dtype)
    return normed, total, None if rounding is None else rounded(normed, rounding)


def silu_multiply(both: Tensor, rounding: Rounding) -> Tensor:
    """Return ``silu(gate) * up`` in 8 bits, of (..., 2 * features) contiguous gates and then ups of each token."""
    if both.is_cuda:
        from prox24_lightning.integrations.transformers.decoding import rounding_kernel

        return rounding_kernel.silu_multiply(both, rounding)
    gate, up = both.chunk(2, -1)
    return rounded(F.silu(gate) * up, rounding)


def rounded(inputs: Tensor, rounding: Rounding) -> Tensor:
    """Return (..., features) inputs in 8 bits, in plain torch, as the kernel that rounds alone returns them."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    result, values, scales = rounding.empty(len(tokens))
    found = round_tokens(tokens, rounding.form, float(rounding.given[0]) or None)
    values.view(torch.int8).zero_()[:, : tokens.shape[1]] = found.values.view(torch.int8)
    scales.copy_(found.scales)
    return result
