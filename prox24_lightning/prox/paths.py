"""Which implementation runs for a weight."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def prox_path(weight: Tensor) -> str:
    """Which implementation :func:`~prox24_lightning.prox.prox_24` runs for ``weight``: ``"triton"`` or ``"batched"``.

    The fused Triton kernels take contiguous float32, bfloat16 and float16 weights on a CUDA GPU of compute capability
    8.0 or newer. An ``out`` that is not contiguous also takes the batched path.
    """
    if weight.is_cuda and weight.dtype != torch.float64 and weight.is_contiguous() and _has_triton(weight.device):
        return "triton"
    return "batched"


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
