"""Measure the limits of a GPU: bytes through its memory, operations through its tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prox24_lightning.convert.measurement import release_memory, time_calls


@dataclass(frozen=True)
class Limits:
    """Measured limits of one GPU.

    Attributes:
        bytes_per_second: read plus written, of a large copy from device memory to device memory.
        operations_per_second: multiplications plus additions of a large dense product of random matrices.
    """

    bytes_per_second: float
    operations_per_second: float

    def floor_us(self, bytes_moved: float, operations: float) -> float:
        """Return the least microseconds for moving so many bytes and computing so many operations at the same time."""
        return 1e6 * max(bytes_moved / self.bytes_per_second, operations / self.operations_per_second)


def measure_limits(dtype: torch.dtype, device: torch.device, *, rounds: int = 10) -> Limits:
    """Time a copy of 1 GiB (or a 16th of the free memory) and a product of matrices of up to 8192 x 8192.

    Args:
        dtype: of the matrices.
        device: a CUDA GPU, the current one.
        rounds: repetitions; the median is taken.
    """
    free, _ = torch.cuda.mem_get_info(device)
    size = min(2**30, free // 16)
    width = min(8192, int((size // 4) ** 0.5) // 128 * 128)
    limits = Limits(
        2 * size / _copy_us(size, device, rounds) * 1e6, 2 * width**3 / _product_us(width, dtype, device, rounds) * 1e6
    )
    release_memory()
    return limits


def _copy_us(size: int, device: torch.device, rounds: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return time_calls({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"].median_us


def _product_us(width: int, dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (torch.randn(width, width, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return time_calls({"product": lambda: torch.mm(left, right, out=out)}, rounds=rounds)["product"].median_us
