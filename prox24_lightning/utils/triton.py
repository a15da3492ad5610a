"""Whether Triton kernels can run on a device."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """Return the reason why fused kernels do not run on the CUDA device; None if they do."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the fused kernel was only tried on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and the fused kernel needs 8.0"
    return None
