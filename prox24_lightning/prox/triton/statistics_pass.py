"""Statistics of a weight from a pass of their own: sums, counts of zeros, and the mask that it would get now."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.prox.triton.arguments import SIZES, Layout, Strides, Tensors, Variant
from prox24_lightning.prox.triton.launch import WIDE, multiprocessors, strided
from prox24_lightning.prox.triton.memory import coordinates, load_groups
from prox24_lightning.prox.triton.statistics import accumulate, zero_sums
from prox24_lightning.weights.groups import group_shape, resolve_group_dim

SUMS = tl.constexpr(9)
"""Squares, squares in the metric, those of the two smallest of each group, penalty in the metric, groups with 0 to 4
zeros."""

BLOCK = 256
WARPS = 4
PROGRAMS = 16
"""Programs a multiprocessor."""


def group_sums(weight: Tensor, *, dim: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of :data:`SUMS` over all groups, float32 ``(9,)``, and for each group, in the order of
    :func:`~prox24_lightning.weights.groups.to_groups`, a byte whose bit i is set if entry i is one of the two largest.

    Args:
        weight: what :func:`~prox24_lightning.prox.prox_path` calls ``"triton"``.
        dim: the dimension of the groups.
        scale: the metric; positive, broadcasts to ``weight``.
    """
    weight = weight.detach()
    dim = resolve_group_dim(weight.shape, dim)
    groups, inner = weight.numel() // 4, weight.shape[dim + 1 :].numel()
    programs = min(triton.cdiv(groups, BLOCK), PROGRAMS * multiprocessors(weight.device))
    sums = torch.zeros((max(programs, 1), SUMS.value), dtype=torch.float32, device=weight.device)
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
                LAST_DIM=inner == 1,
                WIDE=weight.numel() >= WIDE,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return sums.sum(0, dtype=torch.float64).float(), code.movedim(dim, -1).flatten()


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    weight,
    scale,
    results,
    code,
    groups,
    chunk,
    length,
    inner,
    scale_before,
    scale_along,
    scale_behind,
    HAS_SCALE: tl.constexpr,
    LAST_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * chunk  # of the last programs beyond all groups, and beyond 32 bits
    count = tl.minimum(chunk, groups - begin).to(tl.int32)
    begin = begin.to(tl.int32)
    tensors = Tensors(weight, weight, 0.0, scale, results, code, code, None)
    strides = Strides(scale_before, scale_along, scale_behind)
    layout = Layout(length, inner, strides, strides)
    variant: tl.constexpr = Variant(
        one_strength=True,
        has_scale=HAS_SCALE,
        last_dim=LAST_DIM,
        wide=WIDE,
        settle=False,
        pairs=False,
        vectors=False,
        statistics=True,
    )
    sums = zero_sums(BLOCK)
    start = tl.zeros((), tl.int32)
    while start < count:
        group = start + tl.arange(0, BLOCK)
        inside = group < count
        x0, x1, x2, x3 = load_groups(weight, layout, begin, group, inside, variant)
        _, c0, c1, c2, c3 = coordinates(tensors, layout, begin, group, inside, variant)
        sums, bits = accumulate(sums, x0, x1, x2, x3, c0, c1, c2, c3, inside, variant)
        tl.store(code + begin + group, bits.to(tl.uint8), mask=inside)
        start += BLOCK
    for number in tl.static_range(SUMS):
        tl.store(results + tl.program_id(0) * SUMS + number, tl.sum(sums[number], axis=0))
