"""Zero the pruned entries of a CUDA tensor from packed bits, without reading a mask of a byte an entry."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Entries a program."""
WARPS = 4

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_pruned_triton(values: Tensor, packed: Tensor, *, mostly_zero: bool) -> None:
    """Write +0.0 where the mask is False.

    Args:
        values: contiguous, on a CUDA device, entries of 1, 2, 4 or 8 bytes.
        packed: the mask as :func:`~prox24_lightning.mask.pack_mask` gives it, on the same device.
        mostly_zero: whether the pruned entries are expected to be zero: then only those that are not are written, and
            memory is read but not written.
    """
    count = values.numel()
    if count:
        with torch.cuda.device_of(values):
            _zero_kernel[(triton.cdiv(count, BLOCK),)](
                values.view(_INTEGERS[values.element_size()]),
                packed,
                count,
                WIDE=count >= 1 << 31,
                MOSTLY_ZERO=mostly_zero,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


@triton.jit
def _zero_kernel(values, packed, count, WIDE: tl.constexpr, MOSTLY_ZERO: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0)
    if WIDE:
        begin = begin.to(tl.int64)
    at = begin * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    entry = tl.load(values + at, mask=inside, other=0)
    byte = tl.load(packed + at // 8, mask=inside, other=255).to(tl.int32)
    pruned = ((byte >> (at % 8).to(tl.int32)) & 1) == 0
    zero = tl.zeros_like(entry)
    if MOSTLY_ZERO:
        tl.store(values + at, zero, mask=pruned & (entry != 0))
    else:
        # All are written, as memory is written in whole sectors anyway.
        tl.store(values + at, tl.where(pruned, zero, entry), mask=inside)
