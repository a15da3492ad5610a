"""The one buffer that the kernels for a weight of 8 bits read, packed or dense, and the way back; on any device.

A packed buffer is a flat int8 tensor: the values row by row, as the portable form has them
(:mod:`prox24_lightning.convert.format.packed_weight`), the metadata in cuSPARSELt's layout for 8 bits, one float32
scale a row, and four more floats, the first of which is the scale of the inputs if that is fixed (0: each token its
own). The metadata is four bits a group, in tiles of 64 rows by 64 inputs. Within a tile, from the slowest to the
fastest: 16 rows, then the row within its eight, the pair of groups within its four pairs, the lower or upper eight
groups, the upper or lower eight rows, the group within its pair. (Found by packing known patterns with cuSPARSELt 0.8.0
on an H200; a GPU test compares.) A dense buffer holds all values row by row, and the same floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, padded_width, unpack_24
from prox24_lightning.weights.chunks import CHUNK_ENTRIES
from prox24_lightning.weights.rounding import VALUE_DTYPES, RoundedForm, RoundedRows

ROW_MULTIPLE, INPUT_MULTIPLE = 64, 128
"""Rows and inputs are padded with zeros to multiples of these."""

TAIL = 4
"""Floats behind the scales of the rows; the first is the fixed scale of the inputs, or 0."""

_ZERO_GROUPS = 0x44  # indices 0 and 1, twice: two groups of zeros


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return (out_features, in_features) rounded up to multiples of :data:`ROW_MULTIPLE` and :data:`INPUT_MULTIPLE`."""
    return -(-shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE, -(-shape[1] // INPUT_MULTIPLE) * INPUT_MULTIPLE


def buffer_bytes(shape: tuple[int, int]) -> int:
    """Return the bytes of the packed buffer for a weight of ``shape``."""
    rows, columns = padded_shape(shape)
    return rows * columns * 5 // 8 + (rows + TAIL) * 4


@dataclass(frozen=True)
class Places:
    """Where the parts of a packed buffer begin, in bytes; the values are at its start."""

    metadata: int
    row_scales: int
    input_scale: int


def places(shape: tuple[int, int]) -> Places:
    """Return where the parts of the packed buffer for a weight of ``shape`` begin."""
    rows, columns = padded_shape(shape)
    scales = rows * columns * 5 // 8
    return Places(rows * columns // 2, scales, scales + rows * 4)


def to_buffer(packed: PackedWeight) -> Tensor:
    """Return the packed buffer, int8 (bytes,).

    Args:
        packed: a rounded weight.

    Raises:
        TypeError: if the weight is not rounded.
        ValueError: for a scale of the inputs that is not positive and finite.
    """
    if packed.form is None or packed.scales is None:
        raise TypeError(f"a buffer of 8 bits holds a rounded weight, this one is {packed.values.dtype}")
    rows, columns = padded_shape(packed.shape)
    below, behind = rows - packed.shape[0], columns - padded_width(packed.shape[1])
    buffer = packed.values.new_empty(buffer_bytes(packed.shape), dtype=torch.int8)
    values, metadata, floats = _parts(buffer, rows, columns)
    values.copy_(F.pad(packed.values.view(torch.int8), (0, behind // 2, 0, below)))
    indices = F.pad(packed.indices, (0, behind // 8, 0, below), value=_ZERO_GROUPS)
    pairs = indices.view(rows // 64, 4, 2, 8, columns // 64, 2, 4)  # a byte holds a pair of groups
    metadata.copy_(pairs.permute(0, 4, 1, 3, 6, 5, 2))
    _set_floats(floats, packed.scales, packed.input_scale)
    return buffer


def pack_buffer(weight: Tensor, form: RoundedForm, *, input_scale: float | None = None, name: str = "weight") -> Tensor:
    """Return the packed buffer of a dense 2:4 weight, rounded and packed some rows at a time.

    Args:
        weight: (out_features, in_features), float16 or bfloat16, any strides.
        form: of the values.
        input_scale: of the packed weight.
        name: of the layer, for errors.

    Raises:
        ValueError: if the weight is not strictly 2:4, or a row cannot be rounded.
        RuntimeError: if the buffer differs from the rounded weight: every part is read back and compared.
    """
    shape = weight.shape[0], weight.shape[1]
    rows, columns = padded_shape(shape)
    buffer = weight.new_empty(buffer_bytes(shape), dtype=torch.int8)
    values, metadata, floats = _parts(buffer, rows, columns)
    step = max(1, CHUNK_ENTRIES // max(columns, 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    scales = []
    for start in range(0, shape[0], step):
        packed = pack_24(weight[start : start + step], form=form, name=name)
        part = to_buffer(packed)
        size = packed.shape[0]
        found = from_buffer(part, (size, columns), form, weight.dtype)
        if not torch.equal(unpack_24(found)[:, : shape[1]], unpack_24(packed)):
            raise RuntimeError(f"{name}: the packed weight differs from the dense one")
        part_values, part_metadata, part_floats = _parts(part, padded_shape((size, columns))[0], columns)
        values[start : start + len(part_values)] = part_values
        metadata[start // 64 : start // 64 + len(part_metadata)] = part_metadata
        scales.append(part_floats[:size])
    _set_floats(floats, torch.cat(scales) if scales else floats[:0], input_scale)
    return buffer


def from_buffer(buffer: Tensor, shape: tuple[int, int], form: RoundedForm, dtype: torch.dtype) -> PackedWeight:
    """Undo :func:`to_buffer`; ``dtype`` is that of the dense weight.

    Raises:
        ValueError: if the buffer is not one of this shape.
    """
    rows, columns = padded_shape(shape)
    if buffer.dtype != torch.int8 or buffer.numel() != buffer_bytes(shape):
        raise ValueError(
            f"{buffer.numel()} entries of {buffer.dtype} are no packed buffer of shape {tuple(shape)}, which has "
            f"{buffer_bytes(shape)} bytes"
        )
    values, metadata, floats = _parts(buffer.flatten(), rows, columns)
    width = padded_width(shape[1])
    indices = metadata.permute(0, 2, 6, 3, 1, 5, 4).reshape(rows, columns // 8)
    return PackedWeight(
        values[: shape[0], : width // 2].contiguous().view(VALUE_DTYPES[form]),
        indices[: shape[0], : width // 8].contiguous(),
        shape,
        floats[: shape[0]].clone(),
        dtype,
        input_scale(buffer),
    )


def input_scale(buffer: Tensor) -> float | None:
    """Return the fixed scale of the inputs that a buffer holds, or None."""
    return float(tail(buffer)[0]) or None


def tail(buffer: Tensor) -> Tensor:
    """Return a view of the float32 (4,) behind the scales of the rows; the first is the fixed scale, or 0."""
    return buffer.flatten()[-4 * TAIL :].view(torch.float32)


def dense_buffer_bytes(shape: tuple[int, int]) -> int:
    """Return the bytes of the dense buffer for a weight of ``shape``."""
    rows, columns = padded_shape(shape)
    return rows * columns + (rows + TAIL) * 4


def to_dense_buffer(weight: RoundedRows, input_scale: float | None = None) -> Tensor:
    """Return the dense buffer, int8 (bytes,), of a rounded weight (out_features, in_features)."""
    out_features, in_features = weight.values.shape
    buffer = weight.values.new_zeros(dense_buffer_bytes((out_features, in_features)), dtype=torch.int8)
    values, floats = dense_parts(buffer, (out_features, in_features))
    values[:out_features, :in_features] = weight.values.view(torch.int8)
    _set_floats(floats, weight.scales, input_scale)
    return buffer


def from_dense_buffer(buffer: Tensor, shape: tuple[int, int], form: RoundedForm) -> RoundedRows:
    """Undo :func:`to_dense_buffer`."""
    values, floats = dense_parts(buffer, shape)
    return RoundedRows(values[: shape[0], : shape[1]].contiguous().view(VALUE_DTYPES[form]), floats[: shape[0]].clone())


def dense_parts(buffer: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return views of a dense buffer: int8 (padded rows, padded inputs) values, float32 scales and tail."""
    rows, columns = padded_shape(shape)
    return buffer[: rows * columns].view(rows, columns), buffer[rows * columns :].view(torch.float32)


def random_buffer(shape: tuple[int, int], form: RoundedForm, device: torch.device, seed: int) -> Tensor:
    """Return the packed buffer of a random 2:4 weight, to measure with; the dense one is never made.

    No kept value is zero.
    """
    rows, columns = padded_shape(shape)
    generator = torch.Generator(device=device).manual_seed(seed)
    size = rows * columns // 2
    if form == "int8":
        values = torch.randint(-127, 128, (size,), generator=generator, device=device, dtype=torch.int8)
    else:
        normal = torch.randn(size, generator=generator, device=device, dtype=torch.float16) * 100
        values = normal.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.int8)
    values.masked_fill_((values & 127) == 0, 1)
    codes = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], device=device)
    chosen = torch.randint(len(codes), (2, rows * columns // 8), generator=generator, device=device)
    low, high = codes.to(torch.uint8)[chosen]
    floats = torch.rand(rows + TAIL, generator=generator, device=device) / 2**10 + 2**-11
    floats[-TAIL:] = 0
    return torch.cat([values, (low | high << 4).view(torch.int8), floats.view(torch.int8)])


def _parts(buffer: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views: int8 (rows, columns / 2) values, uint8 metadata (as the module describes it), float32 floats."""
    values, metadata, floats = buffer.split([rows * columns // 2, rows * columns // 8, (rows + TAIL) * 4])
    tiles = metadata.view(torch.uint8).view(rows // 64, columns // 64, 4, 8, 4, 2, 2)
    return values.view(rows, columns // 2), tiles, floats.view(torch.float32)


def _set_floats(floats: Tensor, scales: Tensor, input_scale: float | None) -> None:
    """Write the scales of the rows, 1 for rows of padding, and the scale of the inputs."""
    if input_scale is not None and not 0 < input_scale < float("inf"):
        raise ValueError(f"the scale of the inputs is {input_scale}, it must be positive and finite")
    floats.fill_(1)
    floats[: len(scales)] = scales
    floats[-TAIL:] = 0
    floats[-TAIL] = input_scale or 0
