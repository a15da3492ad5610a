"""What a look at a weight needs, from one pass over it: sums, counts of zeros, and the mask it would get now."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.triton_kernel import WIDE, multiprocessors, strided
from prox24_lightning.prox.triton_memory import SIZES, coordinates, load_groups, scaled

SUMS = 9
"""Squares, squares in the metric, those of the two smallest of each group, penalty in the metric, groups with 0 to 4
zeros."""

BLOCK = 256
WARPS = 4
PROGRAMS = 16
"""Programs a multiprocessor."""


def group_sums(weight: Tensor, *, dim: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of :data:`SUMS` over all groups, float32 ``(9,)``, and for each group, in the order of
    :func:`~prox24_lightning.groups.to_groups`, a byte whose bit i is set if entry i is one of the two largest.

    Args:
        weight: what :func:`~prox24_lightning.prox.prox_path` calls ``"triton"``.
        dim: the dimension of the groups.
        scale: the metric; positive, broadcasts to ``weight``.
    """
    weight = weight.detach()
    dim = resolve_group_dim(weight.shape, dim)
    groups, inner = weight.numel() // 4, weight.shape[dim + 1 :].numel()
    programs = min(triton.cdiv(groups, BLOCK), PROGRAMS * multiprocessors(weight.device))
    sums = torch.zeros((max(programs, 1), SUMS), dtype=torch.float32, device=weight.device)
    code = torch.empty(group_shape(weight.shape, dim), dtype=torch.uint8, device=weight.device)
    values, strides = (sums, (0, 0, 0)) if scale is None else strided(scale, weight.shape, dim, weight.device)
    if groups:
        with torch.cuda.device_of(weight):
            _sums_kernel[(programs,)](
                weight,
                values,
                sums,
                code,
                groups,
                triton.cdiv(triton.cdiv(groups, programs), BLOCK) * BLOCK,
                weight.shape[dim] // 4,
                inner,
                *strides,
                HAS_SCALE=scale is not None,
                ROWS=inner == 1,
                WIDE=weight.numel() >= WIDE,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return sums.sum(0, dtype=torch.float64).float(), code.movedim(dim, -1).flatten()


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    weight,
    scale,
    sums,
    code,
    groups,
    chunk,
    length,
    inner,
    before,
    along,
    behind,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * chunk  # of the last programs beyond all groups, and beyond 32 bits
    count = tl.minimum(chunk, groups - begin).to(tl.int32)
    begin = begin.to(tl.int32)
    tensors = (weight, weight, 0.0, scale)
    shape = (length, inner, (before, along, behind), (before, along, behind))
    kind: tl.constexpr = (True, HAS_SCALE, ROWS, WIDE, False, False)
    squares = tl.zeros([BLOCK], tl.float32)
    metric, lost, penalty = squares, squares, squares
    z0, z1, z2, z3, z4 = squares, squares, squares, squares, squares
    start = tl.zeros((), tl.int32)
    while start < count:
        group = start + tl.arange(0, BLOCK)
        inside = group < count
        x0, x1, x2, x3 = load_groups(weight, shape, begin, group, inside, kind)
        x0, x1, x2, x3 = _inside(inside, x0), _inside(inside, x1), _inside(inside, x2), _inside(inside, x3)
        squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
        zeros = (x0 == 0).to(tl.int32) + (x1 == 0).to(tl.int32) + (x2 == 0).to(tl.int32) + (x3 == 0).to(tl.int32)
        zeros = tl.where(inside, zeros, 5)
        z0 += tl.where(zeros == 0, 1.0, 0.0)
        z1 += tl.where(zeros == 1, 1.0, 0.0)
        z2 += tl.where(zeros == 2, 1.0, 0.0)
        z3 += tl.where(zeros == 3, 1.0, 0.0)
        z4 += tl.where(zeros == 4, 1.0, 0.0)
        _, c0, c1, c2, c3 = coordinates(tensors, shape, begin, group, inside, kind)
        a, b, c, d = scaled(x0, x1, x2, x3, c0, c1, c2, c3, kind)
        penalty += a * b * (c + d) + c * d * (a + b)
        a, b, c, d = a * a, b * b, c * c, d * d
        metric += a + b + c + d
        high0, low0, high1, low1 = tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d)
        lost += tl.minimum(low0, low1) + tl.minimum(tl.minimum(high0, high1), tl.maximum(low0, low1))
        # Bit i where fewer than two others beat entry i; among equals the earlier one wins.
        b0, b1, b2 = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
        b3, b4, b5 = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
        bits = tl.where(b0 + b1 + b2 < 2, 1, 0) + tl.where(1 - b0 + b3 + b4 < 2, 2, 0)
        bits += tl.where(2 - b1 - b3 + b5 < 2, 4, 0) + tl.where(3 - b2 - b4 - b5 < 2, 8, 0)
        tl.store(code + begin + group, bits.to(tl.uint8), mask=inside)
        start += BLOCK
    at = sums + tl.program_id(0) * 9
    tl.store(at, tl.sum(squares, 0))
    tl.store(at + 1, tl.sum(metric, 0))
    tl.store(at + 2, tl.sum(lost, 0))
    tl.store(at + 3, tl.sum(penalty, 0))
    tl.store(at + 4, tl.sum(z0, 0))
    tl.store(at + 5, tl.sum(z1, 0))
    tl.store(at + 6, tl.sum(z2, 0))
    tl.store(at + 7, tl.sum(z3, 0))
    tl.store(at + 8, tl.sum(z4, 0))


@triton.jit
def _inside(inside, x):
    return tl.where(inside, x, 0.0)
