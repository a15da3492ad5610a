"""Convert a packed weight into the one buffer that all kernels read, in cuSPARSELt's layout, and back; on any device.

The buffer holds the values row by row, as the portable form does
(:mod:`prox24_lightning.convert.format.packed_weight`), and after them the metadata, the indices of the kept entries:
four bits a group, in tiles of 64 rows by 32 inputs. Within a tile, from the slowest to the fastest: 16 rows, then the
row within its eight, the group within its four, the upper or lower four groups, the upper or lower eight rows. (Found
by packing known patterns with cuSPARSELt 0.8.0 on an H200; a GPU test compares.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, padded_width, unpack_24
from prox24_lightning.weights.chunks import CHUNK_ENTRIES

MULTIPLE = 64
"""Rows and inputs are padded with zeros to a multiple of this."""

_ZERO_GROUPS = 0x44  # indices 0 and 1, twice: two groups of zeros


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return (out_features, in_features) rounded up to multiples of :data:`MULTIPLE`."""
    rows, columns = (-(-size // MULTIPLE) * MULTIPLE for size in shape)
    return rows, columns


def buffer_bytes(shape: tuple[int, int]) -> int:
    """Return the bytes of the buffer for a 16-bit weight of ``shape``."""
    rows, columns = padded_shape(shape)
    return rows * columns * 9 // 8


def to_buffer(packed: PackedWeight) -> Tensor:
    """Return the buffer, int16 (padded rows, padded inputs x 9/16): the values, then the tiles of metadata.

    Raises:
        TypeError: if the values are not 16 bits wide.
    """
    if packed.values.itemsize != 2:
        raise TypeError(f"a buffer holds 16-bit values, these are {packed.dtype}")
    rows, columns = padded_shape(packed.shape)
    below, behind = rows - packed.shape[0], columns - padded_width(packed.shape[1])
    buffer = packed.values.new_empty(rows * columns // 16 * 9, dtype=torch.int16)
    values = F.pad(packed.values.view(torch.int16), (0, behind // 2, 0, below))
    buffer[: rows * columns // 2] = values.flatten()
    indices = F.pad(packed.indices, (0, behind // 8, 0, below), value=_ZERO_GROUPS)
    codes = torch.stack([indices & 15, indices >> 4], dim=-1)
    tiles = codes.view(rows // 64, 4, 2, 8, columns // 32, 2, 4).permute(0, 4, 1, 3, 6, 5, 2)
    buffer[rows * columns // 2 :] = (tiles[..., 0] | tiles[..., 1] << 4).contiguous().view(torch.int16).flatten()
    return buffer.view(rows, columns // 16 * 9)


def pack_buffer(weight: Tensor, *, name: str = "weight") -> Tensor:
    """Return the buffer of a dense 2:4 weight, packed some rows at a time: little more memory is taken than its own.

    Args:
        weight: (out_features, in_features), float16 or bfloat16, any strides.
        name: of the layer, for errors.

    Raises:
        ValueError: if the weight is not strictly 2:4.
        RuntimeError: if the packed weight differs from the dense one: every part is unpacked and compared.
    """
    shape = weight.shape[0], weight.shape[1]
    rows, columns = padded_shape(shape)
    buffer = weight.new_empty(rows * columns // 16 * 9, dtype=torch.int16)
    values, metadata = buffer[: rows * columns // 2], buffer[rows * columns // 2 :]
    step = max(1, CHUNK_ENTRIES // max(columns, 1) // MULTIPLE) * MULTIPLE
    for start in range(0, shape[0], step):
        dense = weight[start : start + step]
        part = to_buffer(pack_24(dense, name=name))
        if not torch.equal(unpack_24(from_buffer(part, (len(dense), columns), weight.dtype))[:, : shape[1]], dense):
            raise RuntimeError(f"{name}: the packed weight differs from the dense one")
        size = part.shape[0] * columns
        at = start * columns
        flat = part.flatten()
        values[at // 2 : (at + size) // 2] = flat[: size // 2]
        metadata[at // 16 : (at + size) // 16] = flat[size // 2 :]
    return buffer.view(rows, columns // 16 * 9)


def from_buffer(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """Undo :func:`to_buffer`."""
    rows, columns = padded_shape(shape)
    width = padded_width(shape[1])
    flat = buffer.view(torch.int16).flatten()
    values = flat[: rows * columns // 2].view(rows, columns // 2)[: shape[0], : width // 2]
    tiles = flat[rows * columns // 2 :].view(torch.uint8).view(rows // 64, columns // 32, 4, 8, 4, 2)
    codes = torch.stack([tiles & 15, tiles >> 4], dim=-1).permute(0, 2, 6, 3, 1, 5, 4).reshape(rows, columns // 8, 2)
    indices = (codes[..., 0] | codes[..., 1] << 4)[: shape[0], : width // 8]
    return PackedWeight(values.contiguous().view(dtype), indices.contiguous(), shape)


def random_buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Return the buffer of a random 2:4 weight of normal values, to measure with; the dense one is never made."""
    rows, columns = padded_shape(shape)
    generator = torch.Generator(device=device).manual_seed(seed)
    values = torch.randn(rows * columns // 2, generator=generator, device=device, dtype=dtype)
    codes = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], device=device)
    chosen = torch.randint(len(codes), (2, rows * columns // 8), generator=generator, device=device)
    low, high = codes.to(torch.uint8)[chosen]
    return torch.cat([values.view(torch.int16), (low | high << 4).view(torch.int16)]).view(rows, columns // 16 * 9)
