"""Launches of the kernels for one weight: the exact 2:4 proximal operator at the speed of memory.

The same equations and the same rules as ``prox/batched.py``, in float32 for float32, bfloat16 and float16 weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from prox24_lightning.prox.triton.critical import critical_kernel
from prox24_lightning.prox.triton.fused import prox_kernel
from prox24_lightning.prox.triton.interpreter import queue_memory
from prox24_lightning.weights.groups import group_shape, resolve_group_dim

ROUND = 32
"""Groups that a program solves at a time: one a thread."""


@dataclass(frozen=True)
class Launch:
    """Settings of a launch of the fused kernel; the best were measured (H200).

    Attributes:
        tile: groups that a program settles at a time.
        registers: a thread at most. With 64 as many programs fit on a multiprocessor as it takes, 32; with 80 24; with
            96 20.
        programs: a multiprocessor, one after the other; a whole multiple of how many fit. One that ends makes room, so
            none waits for the slowest. Few leave few warps half filled at their ends; many write the groups that
            waited sooner, while the device's cache still holds what is around them.
    """

    tile: int = 64
    registers: int = 64
    programs: int = 96


LAUNCHES = {
    torch.bfloat16: Launch(tile=128, registers=80, programs=72),
    torch.float32: Launch(tile=128, registers=96, programs=160),
}
"""Launches where groups lie along the last dimension, are aligned and have no scales, which take registers."""

SHORTEST = 512
"""Groups a program at least: fewer do not fill its queues."""

CRITICAL_BLOCK = 256
"""Groups a program of the critical strength."""

WIDE = 1 << 31
"""Entries from which on addresses take 64 bits."""


def prox_24_triton(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dim: int = -1,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    settle: bool = False,
) -> Tensor:
    """As :func:`prox24_lightning.prox.prox_24`, which checks the arguments first, for contiguous CUDA tensors; with
    ``settle`` as :func:`prox24_lightning.prox.settle_24`."""
    weight = weight.detach()
    out = torch.empty_like(weight) if out is None else out
    groups = weight.numel() // 4
    if groups == 0:
        return out
    dim = resolve_group_dim(weight.shape, dim)
    inner = weight.shape[dim + 1 :].numel()
    strength, strength_strides = strided(strength, group_shape(weight.shape, dim), dim, weight.device)
    if scale is None:
        scale_values, scale_strides = strength, (0, 0, 0)
    else:
        scale_values, scale_strides = strided(scale, weight.shape, dim, weight.device)
    aligned = (weight.data_ptr() | out.data_ptr()) % 16 == 0 and has_words(weight)
    launch = launch_for(weight, last_dim=inner == 1, plain=scale is None and aligned)
    with torch.cuda.device_of(weight):
        programs = programs_for(groups, groups, launch, weight.device)
        prox_kernel[(programs,)](
            weight,
            out.detach(),
            strength,
            scale_values,
            queue_memory(launch.tile + 4 * ROUND, weight.device),
            groups,
            programs,
            weight.shape[dim] // 4,
            inner,
            *strength_strides,
            *scale_strides,
            ONE_STRENGTH=strength.numel() == 1,
            HAS_SCALE=scale is not None,
            LAST_DIM=inner == 1,
            WIDE=weight.numel() >= WIDE,
            SETTLE=settle,
            ALIGNED=aligned,
            TILE=launch.tile,
            ROUND=ROUND,
            num_warps=1,
            maxnreg=launch.registers,
        )
    return out


def critical_24_triton(weight: Tensor, *, dim: int = -1, scale: Tensor | None = None) -> Tensor:
    """As :func:`prox24_lightning.prox.critical_strength_24`, for contiguous CUDA tensors."""
    weight = weight.detach()
    dim = resolve_group_dim(weight.shape, dim)
    result = torch.empty(group_shape(weight.shape, dim), dtype=torch.float32, device=weight.device)
    values, strides = (result, (0, 0, 0)) if scale is None else strided(scale, weight.shape, dim, weight.device)
    groups, inner = result.numel(), weight.shape[dim + 1 :].numel()
    if groups:
        with torch.cuda.device_of(weight):
            critical_kernel[(triton.cdiv(groups, CRITICAL_BLOCK),)](
                weight,
                values,
                result,
                groups,
                weight.shape[dim] // 4,
                inner,
                *strides,
                HAS_SCALE=scale is not None,
                LAST_DIM=inner == 1,
                WIDE=weight.numel() >= WIDE,
                BLOCK=CRITICAL_BLOCK,
                num_warps=4,
            )
    return result


def strided(
    value: float | Tensor, shape: tuple[int, ...] | torch.Size, dim: int, device: torch.device
) -> tuple[Tensor, tuple[int, int, int]]:
    """Return ``value`` in float32, with its strides before, along and behind ``dim``."""
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


def has_words(weight: Tensor) -> bool:
    """Whether the kernel has a faster way to reach such weights if they are aligned: bfloat16 pairs need compute
    capability 9.0."""
    return weight.dtype != torch.bfloat16 or capability(weight.device) >= (9, 0)


def launch_for(weight: Tensor, *, last_dim: bool, plain: bool) -> Launch:
    """The best launch for groups along the last dimension or another one; ``plain``: aligned, and without scales."""
    return LAUNCHES.get(weight.dtype, Launch()) if last_dim and plain else Launch()


def programs_for(groups: int, total: int, launch: Launch, device: torch.device) -> int:
    """The number of programs that share ``groups`` of the ``total`` in a launch."""
    share = max(triton.cdiv(total, launch.programs * multiprocessors(device)), SHORTEST)
    return triton.cdiv(groups, share)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; (0, 0) in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; 1 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
