"""Store a mask at one bit a weight: a 32nd of a float32 weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prox24_lightning.weights.groups import check_weight

_BITS = tuple(1 << i for i in range(8))

BYTES_AT_A_TIME = 2**18
"""Packed bytes worked on at a time: bounds the scratch memory to some 6 MB."""


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into ``ceil(numel / 8)`` bytes, row-major, lowest bit first.

    Returns:
        1-D uint8 tensor on the mask's device; unused bits of the last byte are zero.

    Raises:
        TypeError: if ``mask`` is not bool.
    """
    check_weight(mask, "pack_mask", vmap="one by one")
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask takes a bool mask, got {mask.dtype}")
    flat = mask.reshape(-1)
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    for begin in range(0, packed.numel(), BYTES_AT_A_TIME):
        part = flat[8 * begin : 8 * (begin + BYTES_AT_A_TIME)].to(torch.uint8)
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(-1, 8)
        packed[begin : begin + BYTES_AT_A_TIME] = part.mul_(bits).sum(-1, dtype=torch.uint8)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_mask`.

    Raises:
        TypeError: if ``packed`` is not uint8.
        ValueError: if the number of bytes does not belong to ``shape``, or unused bits are set (not looked for in a
            compiled function, as that would break its graph).
    """
    check_weight(packed, "unpack_mask", vmap="one by one")
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_mask takes packed uint8 bits, got {packed.dtype}")
    size = math.prod(shape)
    if packed.dim() != 1 or packed.numel() != -(-size // 8):
        raise ValueError(
            f"{tuple(packed.shape)} packed bytes do not belong to a mask of shape {tuple(shape)}, "
            f"which takes {-(-size // 8)}"
        )
    if size % 8 and not torch.compiler.is_compiling() and bool(packed[-1] >> (size % 8)):
        raise ValueError(f"packed mask of shape {tuple(shape)} has bits set past its end: it is damaged")
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=packed.device)
    mask = torch.empty(size, dtype=torch.bool, device=packed.device)
    for begin in range(0, packed.numel(), BYTES_AT_A_TIME):
        part = (packed[begin : begin + BYTES_AT_A_TIME].unsqueeze(-1) & bits) != 0
        mask[8 * begin : 8 * (begin + BYTES_AT_A_TIME)] = part.view(-1)[: size - 8 * begin]
    return mask.view(tuple(shape))
