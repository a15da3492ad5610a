"""A 2:4 weight in the portable packed form: the two kept entries of each group, and two bits for each one's place.

``values`` is (out_features, in_features / 2) in the weight's dtype, the kept entries in order of position.
``indices`` is uint8 (out_features, in_features / 8): bits 0-1 and 2-3 are the positions, 0 to 3, of the two entries
kept in a byte's first group, bits 4-5 and 6-7 those in its second; the first position of a group is below the second.
Where ``in_features`` does not divide by 8, zeros are appended until it does. That is 0.5625 of a 16-bit dense weight,
and 0.53125 of a float32 one. It is no library's own layout, so it can be stored, and read by any kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.mask import violations_24

PACKED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
)
"""What can be packed: the types in which all bits but the sign are zero for a zero, and int8."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**21  # entries worked on at a time, which bounds the scratch memory
_BROKEN = 255


def _places() -> list[int]:
    """Which of four entries are non-zero, a bit each -> the two kept positions, the free ones from the lowest up."""
    table = []
    for code in range(16):
        kept = [i for i in range(4) if code >> i & 1]
        filled = sorted((kept + [i for i in range(4) if i not in kept])[:2])
        table.append(_BROKEN if len(kept) > 2 else filled[0] | filled[1] << 2)
    return table


_PLACES = _places()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed weight. See the module for the layout of ``values`` and ``indices``.

    Attributes:
        values: (out_features, padded in_features / 2), the weight's dtype.
        indices: uint8 (out_features, padded in_features / 8).
        shape: (out_features, in_features) of the weight.
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + self.indices.nbytes

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on another device."""
        return PackedWeight(self.values.to(device), self.indices.to(device), self.shape)


def pack_24(weight: Tensor, *, name: str = "weight") -> PackedWeight:
    """Pack a 2:4 weight, exactly: :func:`unpack_24` gives an equal one back, NaN and inf bit for bit.

    Only the sign of a zero that is not kept is lost (a weight times its mask holds such -0.0).

    Args:
        weight: (out_features, in_features), any device, any strides, a dtype in :data:`PACKED_DTYPES`; at most two
            non-zeros in each four consecutive inputs. A last group of fewer than four inputs is filled up with zeros.
        name: of the layer, for errors.

    Returns:
        Tensors of their own, on the weight's device; canonical: equal weights give equal ``indices``.

    Raises:
        TypeError: for another dtype.
        ValueError: if the weight is not a matrix or not strictly 2:4, with its first violations.
    """
    weight = weight.detach()
    if weight.dtype not in PACKED_DTYPES:
        raise TypeError(f"{name}: {weight.dtype} cannot be packed, only {', '.join(map(str, PACKED_DTYPES))}")
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: only a matrix (out_features, in_features) is packed")
    rows, columns = weight.shape
    width = padded_width(columns)
    bits = weight.view(_BITS[weight.itemsize]) if weight.is_contiguous() else weight
    values = weight.new_empty(rows, width // 2)
    indices = weight.new_empty(rows, width // 8, dtype=torch.uint8)
    table = torch.tensor(_PLACES, dtype=torch.uint8, device=weight.device)
    broken = torch.zeros((), dtype=torch.bool, device=weight.device)
    for part in row_chunks(rows, width):
        chunk = bits[part] if bits.dtype != weight.dtype else weight[part].contiguous().view(_BITS[weight.itemsize])
        groups = F.pad(chunk, (0, width - columns)).unflatten(-1, (width // 4, 4))
        kept = _nonzero(groups, weight.dtype)
        code = sum(kept[..., i].to(torch.uint8) << i for i in range(4))
        place = table[torch.as_tensor(code).int()]
        broken |= (place == _BROKEN).any()
        # A broken group's 255 reads as positions 3, 3: within bounds, and thrown away with the rest below.
        places = torch.stack([place & 3, place >> 2 & 3], dim=-1)
        values[part] = groups.gather(-1, places.long()).flatten(-2).view(weight.dtype)
        indices[part] = place[:, 0::2] | place[:, 1::2] << 4
    if broken:
        shown = weight if weight.dtype.is_floating_point and weight.itemsize > 1 else weight.float()
        raise ValueError(f"{name} is not 2:4: {violations_24(F.pad(shown, (0, -columns % 4)))}")
    return PackedWeight(values, indices, (rows, columns))


def unpack_24(packed: PackedWeight, *, name: str = "weight") -> Tensor:
    """The dense (out_features, in_features) weight, zeros where nothing was kept; undoes :func:`pack_24`.

    Raises:
        ValueError: if the tensors do not belong together or do not describe a weight; see :func:`check_packed`.
    """
    check_packed(packed, name=name)
    rows, columns = packed.shape
    width = padded_width(columns)
    dense = packed.values.new_empty(rows, columns)
    for part in row_chunks(rows, width):
        places = _positions(packed.indices[part])
        kept = packed.values[part].contiguous().view(_BITS[dense.itemsize]).view(places.shape)
        groups = kept.new_zeros(*places.shape[:-1], 4).scatter_(-1, places.long(), kept)
        dense[part] = groups.flatten(-2)[:, :columns].view(dense.dtype)
    return dense


def check_packed(packed: PackedWeight, *, name: str = "weight") -> None:
    """Refuse what :func:`pack_24` cannot have made.

    Raises:
        TypeError: for a dtype that is not packed.
        ValueError: for shapes that do not belong together, positions that do not ascend, or a value behind the end of a
            row; by the layer's name.
    """
    values, indices, shape = packed.values, packed.indices, packed.shape
    if values.dtype not in PACKED_DTYPES or indices.dtype != torch.uint8:
        raise TypeError(f"{name}: values of {values.dtype} and indices of {indices.dtype} are no packed weight")
    rows, columns = shape
    width = padded_width(columns)
    if tuple(values.shape) != (rows, width // 2) or tuple(indices.shape) != (rows, width // 8):
        raise ValueError(
            f"{name}: values {tuple(values.shape)} and indices {tuple(indices.shape)} do not belong to a weight of "
            f"shape {tuple(shape)}, which takes {(rows, width // 2)} and {(rows, width // 8)}"
        )
    for part in row_chunks(rows, width):
        places = _positions(indices[part])
        wrong = places[..., 0] >= places[..., 1]
        if wrong.any():
            row, group = (int(i) for i in torch.nonzero(wrong)[0])
            raise ValueError(
                f"{name}: the two positions of group {group} in row {part.start + row} are "
                f"{places[row, group].tolist()}, they must ascend: the indices are damaged"
            )
        if columns % 8:
            at = 4 * torch.arange(width // 4, device=indices.device).unsqueeze(-1) + places
            kept = values[part].contiguous().view(_BITS[values.itemsize]).view(places.shape)
            if (_nonzero(kept, values.dtype) & (at >= columns)).any():
                raise ValueError(f"{name}: a value lies behind the last of {columns} inputs: the tensors are damaged")


def padded_width(in_features: int) -> int:
    """``in_features`` rounded up to the multiple of 8 that a byte of indices covers."""
    return -(-in_features // 8) * 8


def packed_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes that a weight of ``shape`` takes once packed."""
    rows, columns = shape
    return rows * (padded_width(columns) // 2 * itemsize + padded_width(columns) // 8)


def row_chunks(rows: int, width: int) -> list[slice]:
    """Slices of rows that hold few enough entries that scratch tensors of their size are small."""
    if not width:
        return []
    step = max(1, _CHUNK // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _positions(indices: Tensor) -> Tensor:
    """uint8 (rows, bytes) -> uint8 (rows, 2 x bytes groups, 2)."""
    return torch.stack([indices >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1).unflatten(-1, (-1, 2))


def _nonzero(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """What is not zero, told by the bits: -0.0 is zero, NaN is not."""
    return (bits if dtype == torch.int8 else bits << 1) != 0
