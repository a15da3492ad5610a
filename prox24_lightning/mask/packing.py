"""Store a mask at one bit a weight: a 32nd of a float32 weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = tuple(1 << i for i in range(8))


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into ``ceil(numel / 8)`` bytes, row-major, lowest bit first.

    Returns:
        1-D uint8 tensor on the mask's device; unused bits of the last byte are zero.

    Raises:
        TypeError: if ``mask`` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask takes a bool mask, got {mask.dtype}")
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (flat * bits).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_mask`.

    Raises:
        TypeError: if ``packed`` is not uint8.
        ValueError: if the number of bytes does not belong to ``shape``, or unused bits are set.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_mask takes packed uint8 bits, got {packed.dtype}")
    size = math.prod(shape)
    if packed.dim() != 1 or packed.numel() != -(-size // 8):
        raise ValueError(
            f"{tuple(packed.shape)} packed bytes do not belong to a mask of shape {tuple(shape)}, "
            f"which takes {-(-size // 8)}"
        )
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    flat = (packed.unsqueeze(-1) & bits) != 0
    flat = flat.view(-1)
    if flat[size:].any():
        raise ValueError(f"packed mask of shape {tuple(shape)} has bits set past its end: it is damaged")
    return flat[:size].view(tuple(shape))
