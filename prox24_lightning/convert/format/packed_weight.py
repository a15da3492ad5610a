"""Pack a 2:4 weight into the two kept values of each group and their two-bit indices, and unpack it.

``values`` is (out_features, in_features / 2) in the weight's dtype, the kept entries in order.
``indices`` is uint8 (out_features, in_features / 8), the metadata: bits 0-1 and 2-3 are the indices, 0 to 3, of the two
entries kept in a byte's first group, bits 4-5 and 6-7 those in its second; the first index of a group is below the
second. Where ``in_features`` does not divide by 8, zeros are appended until it does. That is 0.5625 of a 16-bit dense
weight, and 0.53125 of a float32 one. It is no library's own layout, so files can hold it and any kernel can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.mask import violations_24
from prox24_lightning.weights.chunks import row_chunks
from prox24_lightning.weights.rounding import (
    VALUE_DTYPES,
    RoundedForm,
    expand_rows,
    round_rows,
    rounded_form,
)

PACKED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
)
"""The dtypes that can be packed: those in which all bits but the sign are zero for a zero, and int8."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_24 = 255


def _make_index_table() -> list[int]:
    """Return the four index bits of a group for each set of non-zeros, a bit each; missing ones are the lowest free."""
    table = []
    for code in range(16):
        kept = [i for i in range(4) if code >> i & 1]
        filled = sorted((kept + [i for i in range(4) if i not in kept])[:2])
        table.append(_NOT_24 if len(kept) > 2 else filled[0] | filled[1] << 2)
    return table


_INDEX_TABLE = _make_index_table()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed weight; the module describes ``values`` and ``indices``.

    Attributes:
        values: (out_features, padded in_features / 2), the weight's dtype, or that of a rounded form.
        indices: uint8 (out_features, padded in_features / 8).
        shape: (out_features, in_features) of the weight.
        scales: float32 (out_features,) of a rounded weight, else None.
        dense_dtype: what a rounded weight is expanded to, else None.
        input_scale: what a unit of a rounded weight's rounded inputs stands for, if that is fixed; None gives each
            token the scale that it needs.
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]
    scales: Tensor | None = None
    dense_dtype: torch.dtype | None = None
    input_scale: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight."""
        return self.dense_dtype or self.values.dtype

    @property
    def form(self) -> RoundedForm | None:
        """The form of a rounded weight; None where the values are the weight's own."""
        return None if self.scales is None else rounded_form(self.values.dtype)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.values.nbytes + self.indices.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the packed weight on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, values=self.values.to(device), indices=self.indices.to(device), scales=scales)


def pack_24(weight: Tensor, *, form: RoundedForm | None = None, name: str = "weight") -> PackedWeight:
    """Pack a 2:4 weight, exactly: :func:`unpack_24` returns an equal one, NaN and inf bit for bit.

    Only the sign of a zero that is not kept is lost (a weight times its mask holds such -0.0). With ``form`` the weight
    is rounded first (:func:`~prox24_lightning.weights.rounding.round_rows`), and ``unpack_24`` returns the
    rounded weight; packing that again gives the same bytes.

    Args:
        weight: (out_features, in_features), any device, any strides, a dtype in :data:`PACKED_DTYPES`; at most two
            non-zeros in each four consecutive inputs. A last group of fewer than four inputs is padded with zeros.
        form: round the rows to 8 bits; None keeps the values as they are.
        name: of the layer, for errors.

    Returns:
        New tensors on the weight's device; canonical: equal weights give equal ``indices``.

    Raises:
        TypeError: for another dtype; with ``form`` for one of 8 bits.
        ValueError: if the weight is not a matrix or not strictly 2:4, with its first violations; with ``form`` for a
            row that cannot be rounded.
    """
    weight = weight.detach()
    possible = PACKED_DTYPES if form is None else [dtype for dtype in PACKED_DTYPES if dtype.itemsize > 1]
    if weight.dtype not in possible:
        raise TypeError(f"{name}: {weight.dtype} cannot be packed, only {', '.join(map(str, possible))}")
    if weight.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: only a matrix (out_features, in_features) is packed")
    rows, columns = weight.shape
    width = padded_width(columns)
    dtype = weight.dtype if form is None else VALUE_DTYPES[form]
    values = weight.new_empty(rows, width // 2, dtype=dtype)
    indices = weight.new_empty(rows, width // 8, dtype=torch.uint8)
    scales = None if form is None else weight.new_ones(rows, dtype=torch.float32)
    table = torch.tensor(_INDEX_TABLE, dtype=torch.uint8, device=weight.device)
    broken = torch.zeros((), dtype=torch.bool, device=weight.device)
    for part in row_chunks(rows, width):
        chunk = weight[part].contiguous()
        groups = _groups(chunk, width)
        if form is not None and scales is not None:
            broken |= (_nonzero(groups, weight.dtype).sum(-1) > 2).any()  # rounding must not hide a third entry
            rounded = round_rows(chunk, form, name=name, first_row=part.start)
            scales[part] = rounded.scales
            groups = _groups(rounded.values, width)
        kept = _nonzero(groups, dtype)
        code = sum(kept[..., i].to(torch.uint8) << i for i in range(4))
        index_bits = table[torch.as_tensor(code).int()]
        broken |= (index_bits == _NOT_24).any()
        # The 255 of a group that is not 2:4 reads as indices 3, 3: within bounds, and discarded with the rest below.
        kept_indices = torch.stack([index_bits & 3, index_bits >> 2 & 3], dim=-1)
        values[part] = groups.gather(-1, kept_indices.long()).flatten(-2).view(dtype)
        indices[part] = index_bits[:, 0::2] | index_bits[:, 1::2] << 4
    if broken:
        shown = weight if weight.dtype.is_floating_point and weight.itemsize > 1 else weight.float()
        raise ValueError(f"{name} is not 2:4: {violations_24(F.pad(shown, (0, -columns % 4)))}")
    return PackedWeight(values, indices, (rows, columns), scales, None if form is None else weight.dtype)


def unpack_24(packed: PackedWeight, *, name: str = "weight") -> Tensor:
    """Return the dense (out_features, in_features) weight, zeros where nothing was kept; undoes :func:`pack_24`.

    Raises:
        ValueError: if the tensors do not belong together or do not describe a weight; see :func:`check_packed`.
    """
    check_packed(packed, name=name)
    rows, columns = packed.shape
    width = padded_width(columns)
    dense = packed.values.new_empty(rows, columns, dtype=packed.dtype)
    for part in row_chunks(rows, width):
        kept_indices = _unpack_indices(packed.indices[part])
        kept = packed.values[part].contiguous().view(_BITS[packed.values.itemsize]).view(kept_indices.shape)
        groups = kept.new_zeros(*kept_indices.shape[:-1], 4).scatter_(-1, kept_indices.long(), kept)
        chunk = groups.flatten(-2)[:, :columns].view(packed.values.dtype)
        dense[part] = chunk if packed.scales is None else expand_rows(chunk, packed.scales[part], packed.dtype)
    return dense


def check_packed(packed: PackedWeight, *, name: str = "weight") -> None:
    """Raise for tensors that :func:`pack_24` cannot have made.

    Raises:
        TypeError: for a dtype that is not packed.
        ValueError: for shapes that do not belong together, indices that do not ascend, a value beyond the end of a
            row, and scales that are not finite and positive; with the layer's name.
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
    _check_scales(packed, name)
    for part in row_chunks(rows, width):
        kept_indices = _unpack_indices(indices[part])
        wrong = kept_indices[..., 0] >= kept_indices[..., 1]
        if wrong.any():
            row, group = (int(i) for i in torch.nonzero(wrong)[0])
            raise ValueError(
                f"{name}: the two indices of group {group} in row {part.start + row} are "
                f"{kept_indices[row, group].tolist()}, they must ascend: the metadata is damaged"
            )
        if packed.form == "fp8_e4m3" and (values[part].contiguous().view(torch.uint8) & 127 == 127).any():
            raise ValueError(f"{name}: a value in rows {part.start} to {part.stop} is NaN: the tensors are damaged")
        if columns % 8:
            inputs = 4 * torch.arange(width // 4, device=indices.device).unsqueeze(-1) + kept_indices
            kept = values[part].contiguous().view(_BITS[values.itemsize]).view(kept_indices.shape)
            if (_nonzero(kept, values.dtype) & (inputs >= columns)).any():
                raise ValueError(f"{name}: a value lies beyond the last of {columns} inputs: the tensors are damaged")


def _check_scales(packed: PackedWeight, name: str) -> None:
    scales, dtype = packed.scales, packed.dense_dtype
    if scales is None and dtype is None:
        return
    if scales is None or dtype is None or not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f"{name}: scales and the dtype of the dense weight come together, and that is {dtype}")
    if scales.dtype != torch.float32 or tuple(scales.shape) != (packed.shape[0],):
        raise ValueError(
            f"{name}: scales {scales.dtype} {tuple(scales.shape)} do not belong to {packed.shape[0]} rows of "
            f"{rounded_form(packed.values.dtype)}"
        )
    wrong = ~(torch.isfinite(scales) & (scales > 0))
    if wrong.any():
        row = int(torch.nonzero(wrong)[0])
        raise ValueError(
            f"{name}: the scale of row {row} is {float(scales[row])}, it must be finite and positive: the tensors are "
            "damaged"
        )


def padded_width(in_features: int) -> int:
    """Return ``in_features`` rounded up to a multiple of 8, the inputs that a byte of indices covers."""
    return -(-in_features // 8) * 8


def packed_bytes(shape: Sequence[int], itemsize: int, *, rounded: bool = False) -> int:
    """Return the bytes that a weight of ``shape`` takes once packed: values of ``itemsize`` bytes, indices, scales."""
    rows, columns = shape
    return rows * (padded_width(columns) // 2 * itemsize + padded_width(columns) // 8 + (4 if rounded else 0))


def _groups(chunk: Tensor, width: int) -> Tensor:
    """Return the bits of rows in groups of four, padded: (rows, width / 4, 4)."""
    bits = chunk.view(_BITS[chunk.itemsize])
    return F.pad(bits, (0, width - bits.shape[1])).unflatten(-1, (width // 4, 4))


def _unpack_indices(indices: Tensor) -> Tensor:
    """Return the two indices of each group: uint8 (rows, bytes) -> uint8 (rows, 2 x bytes groups, 2)."""
    return torch.stack([indices >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1).unflatten(-1, (-1, 2))


def _nonzero(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which entries are not zero, by their bits: -0.0 is zero, NaN is not."""
    return (bits if dtype == torch.int8 else bits << 1) != 0
