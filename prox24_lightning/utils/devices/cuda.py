"""Devices by name, whether Triton kernels run on them, and whether they may round the inputs of float32 products."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def exact_device(device: str | torch.device) -> torch.device:
    """Return the device as its tensors name it: ``cuda:0`` for ``cuda``, so that it compares with theirs."""
    return torch.empty(0, device=device).device


def allows_tf32() -> bool:
    """Return whether the inputs of float32 products on CUDA devices may be rounded to ten bits."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products in full precision, on CPUs too; with less the solver of a layer ends at a higher loss.

    Do not run compiled code inside: it would be compiled again for another setting.
    """
    matmul = torch.backends.cuda.matmul
    # Torch 2.9 has a setting for each library; read or set by its older name, the two must agree.
    settings: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False)]
    if hasattr(matmul, "fp32_precision"):
        libraries = (matmul, getattr(torch.backends.mkldnn, "matmul", None))
        settings = [(one, "fp32_precision", "ieee") for one in libraries if hasattr(one, "fp32_precision")]
    before = [getattr(library, name) for library, name, _ in settings]
    for library, name, whole in settings:
        setattr(library, name, whole)
    try:
        yield
    finally:
        for (library, name, _), value in zip(settings, before, strict=True):
            setattr(library, name, value)


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
