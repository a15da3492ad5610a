"""Launching the fused kernels of ``triton_fused.py``: the exact 2:4 proximal operator at the speed of memory.

The same equations and the same rules as ``batched.py``, in float32 for float32, bfloat16 and float16 weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from prox24_lightning.prox.statistics import ProxStatistics
from prox24_lightning.prox.triton.critical import critical_kernel, critical_many_kernel
from prox24_lightning.prox.triton.fused import prox_kernel, prox_many_kernel
from prox24_lightning.weights.groups import group_shape, resolve_group_dim

ROUND = 32
"""Groups that a program solves at a time: one a thread."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched; which is best was measured (H200).

    Attributes:
        tile: groups that a program settles at a time.
        registers: a thread at most. With 64 as many programs fit on a multiprocessor as it takes, 32; with 80 24; with
            96 20.
        programs: a multiprocessor, one after the other; some whole number of times as many as fit. One that ends makes
            room, so none waits for the slowest. Few leave few warps half filled at their ends; many write the groups
            that waited sooner, while the device's cache still holds what is around them.
    """

    tile: int = 64
    registers: int = 64
    programs: int = 96


LAUNCHES = {
    torch.bfloat16: Launch(tile=128, registers=80, programs=72),
    torch.float32: Launch(tile=128, registers=96, programs=160),
}
"""Where groups lie along the last dimension, are aligned and have no scales, which take registers."""

LOOK_REGISTERS = 96
"""Where sums are kept too."""

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
    lam, lam_strides = strided(strength, group_shape(weight.shape, dim), dim, weight.device)
    if scale is None:
        scale_values, scale_strides = lam, (0, 0, 0)
    else:
        scale_values, scale_strides = strided(scale, weight.shape, dim, weight.device)
    aligned = (weight.data_ptr() | out.data_ptr()) % 16 == 0 and has_words(weight)
    launch = launch_for(weight, rows=inner == 1, plain=scale is None and aligned)
    with torch.cuda.device_of(weight):
        programs = programs_for(groups, groups, launch, weight.device)
        prox_kernel[(programs,)](
            weight,
            out.detach(),
            lam,
            scale_values,
            groups,
            programs,
            weight.shape[dim] // 4,
            inner,
            *lam_strides,
            *scale_strides,
            ONE_STRENGTH=lam.numel() == 1,
            HAS_SCALE=scale is not None,
            ROWS=inner == 1,
            WIDE=weight.numel() >= WIDE,
            WHOLLY=settle,
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
                ROWS=inner == 1,
                WIDE=weight.numel() >= WIDE,
                BLOCK=CRITICAL_BLOCK,
                num_warps=4,
            )
    return result


def _addresses(looks: Sequence[ProxStatistics]) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and where the codes are, of this look and of the one before."""
    device = looks[0].sums.device
    places = [[look.code.data_ptr() for look in looks], [look.before.data_ptr() for look in looks]]
    codes, befores = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
    return looks[0].sums, codes, befores


class ManyWeights:
    """Where many weights are, as the kernel reads it: one launch then works on all of them, in place.

    Args:
        weights: contiguous, of one dtype on one CUDA device; all with groups along the last dimension, or none.
        dims: the dimension of the groups of each, non-negative.
        scales: None, or one float32 tensor of ``(in_features,)`` or the like for each weight, broadcasting to it. They
            are read where they are when the kernel runs.
    """

    def __init__(self, weights: Sequence[Tensor], dims: Sequence[int], scales: list[Tensor] | None) -> None:
        self.weights, self.scales = list(weights), scales
        device = weights[0].device
        total = sum(weight.numel() // 4 for weight in weights)
        inners = [weight.shape[dim + 1 :].numel() for weight, dim in zip(weights, dims, strict=True)]
        self.rows_last = all(inner == 1 for inner in inners)
        self.launch = launch_for(weights[0], rows=self.rows_last, plain=scales is None and has_words(weights[0]))
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, (weight, dim, inner) in enumerate(zip(weights, dims, inners, strict=True)):
            groups = weight.numel() // 4
            programs = programs_for(groups, total, self.launch, device)
            values, strides = (
                (weight, (0, 0, 0)) if scales is None else strided(scales[number], weight.shape, dim, device)
            )
            if scales is not None and values.data_ptr() != scales[number].data_ptr():
                raise ValueError(f"scale {number} is not a float32 tensor on {device} that broadcasts without a copy")
            place = [weight.data_ptr(), values.data_ptr(), groups, programs, weight.shape[dim] // 4, inner]
            rows.append([*place, *strides, len(owners)])
            owners += [number] * programs
        self.wide = any(weight.numel() >= WIDE for weight in weights)
        self._table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        self._owners = torch.tensor(owners, dtype=torch.int32).to(device, non_blocking=True)

    def critical(self, result: Tensor) -> Tensor:
        """Fill ``result``, float32 ``(weights, samples)``, with the critical strengths of groups spread over each."""
        weights, samples = result.shape
        with torch.cuda.device_of(result):
            critical_many_kernel[(weights, triton.cdiv(samples, CRITICAL_BLOCK))](
                self._table,
                self.weights[0],
                result,
                samples,
                HAS_SCALE=self.scales is not None,
                ROWS=self.rows_last,
                WIDE=self.wide,
                BLOCK=CRITICAL_BLOCK,
                num_warps=4,
            )
        return result

    def prox(self, strengths: Tensor, *, settle: bool, looks: Sequence[ProxStatistics] | None = None) -> None:
        """The prox of every weight, in place, with its own of ``strengths``, float32 ``(weights,)`` on the device.

        ``looks``, one for each weight, are filled from the same pass; their sums are rows of one tensor.
        """
        launch = self.launch if looks is None else Launch(registers=LOOK_REGISTERS)
        with torch.cuda.device_of(strengths):
            prox_many_kernel[(len(self._owners),)](
                self._table,
                self._owners,
                strengths,
                *((strengths, self._table, self._table) if looks is None else _addresses(looks)),
                self.weights[0],
                HAS_SCALE=self.scales is not None,
                ROWS=self.rows_last,
                WIDE=self.wide,
                WHOLLY=settle,
                LOOK=looks is not None,
                ALIGNED=has_words(self.weights[0]),
                TILE=launch.tile,
                ROUND=ROUND,
                num_warps=1,
                maxnreg=launch.registers,
            )


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


def has_words(weight: Tensor) -> bool:
    """Whether the kernel has a faster way to reach such weights if they are aligned: for pairs the device needs
    instructions."""
    return weight.dtype != torch.bfloat16 or capability(weight.device) >= (9, 0)


def launch_for(weight: Tensor, *, rows: bool, plain: bool) -> Launch:
    """For groups along the last dimension (``rows``) or another one; ``plain``: aligned, and without scales."""
    return LAUNCHES.get(weight.dtype, Launch()) if rows and plain else Launch()


def programs_for(groups: int, total: int, launch: Launch, device: torch.device) -> int:
    """Programs that share ``groups`` of the ``total`` in a launch."""
    share = max(triton.cdiv(total, launch.programs * multiprocessors(device)), SHORTEST)
    return triton.cdiv(groups, share)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of the device, or of none at all in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device, or of none at all in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
