"""What the kernel of this folder computes, in plain torch on any device, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.weights.rounding import LARGEST, SMALLEST_SCALE, VALUE_DTYPES, RoundedForm, RoundedRows


def round_tokens(inputs: Tensor, form: RoundedForm, scale: float | None = None) -> RoundedRows:
    """Round each token to the nearest values of ``form``, ties to even: ``inputs ~ values * scales``.

    Args:
        inputs: (tokens, in_features), floating point.
        form: of the values.
        scale: of all tokens; None gives each token its largest magnitude over the form's largest value. What exceeds
            the range of a given scale is clamped.

    Returns:
        Values and float32 (tokens,) scales. A token with NaN or inf has a scale of NaN or inf: its products are NaN.
    """
    largest = LARGEST[form]
    most = inputs.abs().amax(-1).float() if inputs.shape[1] else inputs.new_zeros(len(inputs), dtype=torch.float32)
    scales = most * torch.tensor(1 / largest, dtype=torch.float32)
    if scale is not None:
        scales = torch.where(torch.isfinite(scales), torch.full_like(scales, scale), scales)
    scales = scales.clamp_min(SMALLEST_SCALE)
    quotients = (inputs.float() * (1 / scales).unsqueeze(-1)).clamp(-largest, largest)
    values = quotients.nan_to_num(0).round() if form == "int8" else quotients
    return RoundedRows(values.to(VALUE_DTYPES[form]), scales)
