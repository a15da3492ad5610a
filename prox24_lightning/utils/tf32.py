"""TF32 rounding of float32 matrix products on GPUs: whether it is allowed, and a context without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allows_tf32() -> bool:
    """Return whether the inputs of float32 products on CUDA devices may be rounded to ten bits."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products in full precision; with less the solver of a layer ends at a higher loss.

    Do not run compiled code inside: it would be compiled again for another setting.
    """
    matmul = torch.backends.cuda.matmul
    # Torch 2.9 has a setting for each library; read or set by its older name, the two must agree.
    name, whole = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, whole)
    try:
        yield
    finally:
        setattr(matmul, name, before)
