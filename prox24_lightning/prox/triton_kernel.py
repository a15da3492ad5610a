"""The exact 2:4 proximal operator as one fused Triton kernel: load each weight once, solve in registers, store once.

The same equations and the same rules as ``batched.py``, in float32 for float32, bfloat16 and float16 weights.
Programs are one warp wide, so that equations which no group of a warp needs are skipped and iterations end when the
warp is done.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.triton_roots import shrink_sorted

BLOCK = 64
"""Groups a program."""

_PRUNED = tl.constexpr(3e38)


def prox_24_triton(
    weight: Tensor, strength: float | Tensor, *, dim: int = -1, scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """As :func:`prox24_lightning.prox.prox_24`, which checks the arguments first, for contiguous CUDA tensors."""
    weight = weight.detach()
    out = torch.empty_like(weight) if out is None else out
    groups = weight.numel() // 4
    if groups == 0:
        return out
    dim = resolve_group_dim(weight.shape, dim)
    inner = 1
    for size in weight.shape[dim + 1 :]:
        inner *= size
    lam, lam_strides = strided(strength, group_shape(weight.shape, dim), dim, weight.device)
    if scale is None:
        scale_values, scale_strides = lam, (0, 0, 0)
    else:
        scale_values, scale_strides = strided(scale, weight.shape, dim, weight.device)
    with torch.cuda.device_of(weight):
        _prox_kernel[(triton.cdiv(groups, BLOCK),)](
            weight,
            out.detach(),
            lam,
            scale_values,
            groups,
            weight.shape[dim] // 4,
            inner,
            *lam_strides,
            *scale_strides,
            ONE_STRENGTH=lam.numel() == 1,
            HAS_SCALE=scale is not None,
            ROWS=inner == 1,
            WIDE=weight.numel() >= 2**31,  # 64-bit index divisions are slow
            BLOCK=BLOCK,
            num_warps=1,
        )
    return out


def strided(
    value: float | Tensor, shape: tuple[int, ...] | torch.Size, dim: int, device: torch.device
) -> tuple[Tensor, tuple[int, int, int]]:
    """``value`` in float32, with its strides before, along and behind ``dim``."""
    if not isinstance(value, Tensor):
        return torch.full((1,), value, dtype=torch.float32, device=device), (0, 0, 0)  # a fill: no copy from the host
    tensor = value.detach().to(device, torch.float32)
    if tensor.numel() == 1:
        return tensor.reshape(1), (0, 0, 0)
    tensor = tensor.expand(shape)
    if len(shape) > 2:
        tensor = tensor.contiguous()
        behind = tensor.stride(dim)
        return tensor, (behind * shape[dim], behind, 1)
    if len(shape) == 1:
        return tensor, (0, tensor.stride(0), 0)
    first, second = tensor.stride()
    return tensor, ((first, second, 0) if dim == 1 else (0, first, second))


@triton.jit
def _prox_kernel(
    weight,
    out,
    strength,
    scale,
    groups,
    length,
    inner,
    strength_before,
    strength_along,
    strength_behind,
    scale_before,
    scale_along,
    scale_behind,
    ONE_STRENGTH: tl.constexpr,  # noqa: N803
    HAS_SCALE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    group = program * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    before = group // (length * inner)
    along = (group // inner) % length
    behind = group % inner
    if ROWS:
        pair = tl.arange(0, 2)
        at4 = group[:, None, None] * 4 + pair[None, :, None] * 2 + pair[None, None, :]
        inside4 = inside[:, None, None] & (pair[None, :, None] >= 0) & (pair[None, None, :] >= 0)
        even, odd = tl.split(tl.load(weight + at4, mask=inside4, other=0.0).to(tl.float32))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    else:
        at = (before * length + along) * 4 * inner + behind
        x0 = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(weight + at + inner, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(weight + at + 2 * inner, mask=inside, other=0.0).to(tl.float32)
        x3 = tl.load(weight + at + 3 * inner, mask=inside, other=0.0).to(tl.float32)
    if ONE_STRENGTH:
        lam = tl.load(strength) + tl.zeros([BLOCK], tl.float32)
    else:
        lam_at = before * strength_before + along * strength_along + behind * strength_behind
        lam = tl.load(strength + lam_at, mask=inside, other=0.0)

    y0, y1, y2, y3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    bad = (x0 != x0) | (x1 != x1) | (x2 != x2) | (x3 != x3) | (lam != lam) | (lam < 0)
    if HAS_SCALE:
        scale_at = before * scale_before + along * 4 * scale_along + behind * scale_behind
        c0 = tl.load(scale + scale_at, mask=inside, other=1.0)
        c1 = tl.load(scale + scale_at + scale_along, mask=inside, other=1.0)
        c2 = tl.load(scale + scale_at + 2 * scale_along, mask=inside, other=1.0)
        c3 = tl.load(scale + scale_at + 3 * scale_along, mask=inside, other=1.0)
        fine = (c0 > 0) & (c1 > 0) & (c2 > 0) & (c3 > 0)
        fine = fine & (c0 < float("inf")) & (c1 < float("inf")) & (c2 < float("inf")) & (c3 < float("inf"))
        bad = bad | (fine == 0)
        y0, y1, y2, y3 = y0 * c0, y1 * c1, y2 * c2, y3 * c3

    high0, low0 = tl.maximum(y0, y2), tl.minimum(y0, y2)
    high1, low1 = tl.maximum(y1, y3), tl.minimum(y1, y3)
    first, fourth = tl.maximum(high0, high1), tl.minimum(low0, low1)
    middle0, middle1 = tl.minimum(high0, high1), tl.maximum(low0, low1)
    second, third = tl.maximum(middle0, middle1), tl.minimum(middle0, middle1)
    s1, s2, s3, s4 = shrink_sorted(first, second, third, fourth, lam)

    # Rank of each entry; among equals the earlier position is the larger.
    later01, later02, later03 = (y1 > y0).to(tl.int32), (y2 > y0).to(tl.int32), (y3 > y0).to(tl.int32)
    later12, later13, later23 = (y2 > y1).to(tl.int32), (y3 > y1).to(tl.int32), (y3 > y2).to(tl.int32)
    s_0 = _by_rank(later01 + later02 + later03, s1, s2, s3, s4)
    s_1 = _by_rank(1 - later01 + later12 + later13, s1, s2, s3, s4)
    s_2 = _by_rank(2 - later02 - later12 + later23, s1, s2, s3, s4)
    s_3 = _by_rank(3 - later03 - later13 - later23, s1, s2, s3, s4)
    if HAS_SCALE:
        r0, r1 = _apply(x0, s_0, s_0 / c0, bad), _apply(x1, s_1, s_1 / c1, bad)
        r2, r3 = _apply(x2, s_2, s_2 / c2, bad), _apply(x3, s_3, s_3 / c3, bad)
    else:
        r0, r1 = _apply(x0, s_0, s_0, bad), _apply(x1, s_1, s_1, bad)
        r2, r3 = _apply(x2, s_2, s_2, bad), _apply(x3, s_3, s_3, bad)

    if ROWS:
        result = tl.join(tl.join(r0, r2), tl.join(r1, r3))
        tl.store(out + at4, result.to(out.dtype.element_ty), mask=inside4)
    else:
        tl.store(out + at, r0.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + inner, r1.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + 2 * inner, r2.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + 3 * inner, r3.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _by_rank(rank, s1, s2, s3, s4):
    return tl.where(rank == 0, s1, tl.where(rank == 1, s2, tl.where(rank == 2, s3, s4)))


@triton.jit
def _apply(x, shrink, shift, bad):
    kept = tl.where(shrink >= _PRUNED, 0.0, tl.maximum(tl.abs(x) - shift, 0.0))
    signed = tl.where((x < 0) & (kept > 0), -kept, kept)
    return tl.where(bad, float("nan"), signed)
