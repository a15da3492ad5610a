"""Which implementation runs for a weight, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.utils.devices.cuda import why_no_triton

LARGEST = (1 << 33) - (1 << 24)
"""Number of entries from which on the kernel cannot number the groups of a weight."""


def prox_path(weight: Tensor) -> str:
    """Return which implementation :func:`~prox24_lightning.prox.prox_24` runs: ``"triton"`` or ``"batched"``.

    The fused Triton kernels take contiguous float32, bfloat16 and float16 weights on a CUDA GPU of compute capability
    8.0 or newer. An ``out`` that is not contiguous also takes the batched path.
    """
    return "batched" if why_batched(weight) else "triton"


def why_batched(weight: Tensor) -> str | None:
    """Return the reason why the fused kernels do not take ``weight``; None if they do."""
    if not weight.is_cuda:
        return f"the weight is on {weight.device}, and the fused kernel runs on CUDA GPUs"
    if weight.dtype == torch.float64:
        return "the fused kernel computes in float32, and the weight is float64"
    if not weight.is_contiguous():
        return f"the weight is not contiguous: shape {tuple(weight.shape)}, strides {weight.stride()}"
    if weight.numel() >= LARGEST:
        return f"the weight has {weight.numel()} entries, and the fused kernel takes less than {LARGEST}"
    return why_no_triton(weight.device)
