"""Gather the kept entries of a weight with a frozen mask into packed form, in one pass over memory, with Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _VALUES = 32, 64


@triton.jit
def _gather(
    weight,
    indices,
    values,
    rows,
    width,
    stride,
    transposed: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    VALUES: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    inside = (row < rows)[:, None] & (value < width)[None, :]
    if transposed:
        # The rows of the transpose are neighbours in memory: loaded along them, stored across.
        codes = tl.load(indices + row[None, :] * (width // 4) + (value // 4)[:, None], mask=tl.trans(inside), other=0)
        index = (codes.to(tl.int32) >> (2 * (value % 4))[:, None]) & 3
        source = (4 * (value // 2)[:, None] + index).to(tl.int64) * stride + row[None, :]
        found = tl.trans(tl.load(weight + source, mask=tl.trans(inside), other=0.0))
    else:
        codes = tl.load(indices + row[:, None] * (width // 4) + (value // 4)[None, :], mask=inside, other=0)
        index = (codes.to(tl.int32) >> (2 * (value % 4))[None, :]) & 3
        source = row[:, None].to(tl.int64) * stride + 4 * (value // 2)[None, :] + index
        found = tl.load(weight + source, mask=inside, other=0.0)
    tl.store(values + row[:, None].to(tl.int64) * width + value[None, :], found, mask=inside)


def gather(weight: Tensor, indices: Tensor, values: Tensor, transposed: bool) -> None:
    """Write the kept entries into ``values``; arguments as in :func:`.reference.gather`, on a GPU."""
    rows, width = values.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, _VALUES))
    with torch.cuda.device(weight.device):
        _gather[grid](weight, indices, values, rows, width, weight.stride(0), transposed, ROWS=_ROWS, VALUES=_VALUES)
