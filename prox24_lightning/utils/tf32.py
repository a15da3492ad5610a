"""Float32 products of matrices on GPUs: whether they may be rounded to TF32, and how to do without it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allows_tf32() -> bool:
    """Whether the inputs of float32 products on CUDA devices may be rounded to ten bits."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Whole float32 products: training may do with less, the solver of a layer ends at a higher loss.

    Compiled code is made anew under another setting, so it is not to be run inside.
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
