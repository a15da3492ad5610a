"""Launching the fused kernel of ``triton_fused.py``: the exact 2:4 proximal operator at the speed of memory.

The same equations and the same rules as ``batched.py``, in float32 for float32, bfloat16 and float16 weights.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.triton_fused import prox_kernel

TILE = 64
"""Groups that a program settles at a time."""

ROUND = 32
"""Groups that a program solves at a time: one a thread."""

REGISTERS = 72
"""Registers a thread at most."""

PROGRAMS = 56
"""Programs a multiprocessor."""

LARGEST_CHUNK = 1 << 16
"""Groups a program at most: their numbers are kept in 16 bits."""


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
        chunk = chunk_size(groups, weight.device)
        prox_kernel[(triton.cdiv(groups, chunk),)](
            weight,
            out.detach(),
            lam,
            scale_values,
            groups,
            chunk,
            weight.shape[dim] // 4,
            inner,
            lam_strides,
            scale_strides,
            ONE_STRENGTH=lam.numel() == 1,
            HAS_SCALE=scale is not None,
            ROWS=inner == 1,
            WIDE=weight.numel() >= 2**31,  # 64-bit index divisions are slow
            TILE=TILE,
            ROUND=ROUND,
            num_warps=1,
            maxnreg=REGISTERS,
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


def chunk_size(groups: int, device: torch.device) -> int:
    """Groups a program: all programs run at once where that gives each enough to fill its queues."""
    programs = PROGRAMS * multiprocessors(device)
    held = TILE // 2
    return min(held + triton.cdiv(max(triton.cdiv(groups, programs) - held, 4 * TILE), TILE) * TILE, LARGEST_CHUNK)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device, or of none at all in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
