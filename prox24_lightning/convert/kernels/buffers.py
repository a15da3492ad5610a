"""The buffer that the kernels read of a packed weight in any form: of 16 bits, or rounded to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.weights.rounding import RoundedForm


def to_buffer(packed: PackedWeight) -> Tensor:
    """Return the buffer of :mod:`.packed_buffer`, or of :mod:`.rounded_buffer` if the weight is rounded."""
    return packed_buffer.to_buffer(packed) if packed.form is None else rounded_buffer.to_buffer(packed)


def from_buffer(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype, form: RoundedForm | None) -> PackedWeight:
    """Undo :func:`to_buffer`; ``dtype`` is that of the dense weight."""
    if form is None:
        return packed_buffer.from_buffer(buffer, shape, dtype)
    return rounded_buffer.from_buffer(buffer, shape, form, dtype)


def pack_buffer(
    weight: Tensor, form: RoundedForm | None, *, input_scale: float | None = None, name: str = "weight"
) -> Tensor:
    """Return the buffer of a dense 2:4 weight, checked against it; arguments and errors as of both modules."""
    if form is None:
        return packed_buffer.pack_buffer(weight, name=name)
    return rounded_buffer.pack_buffer(weight, form, input_scale=input_scale, name=name)


def empty_buffer(shape: tuple[int, int], form: RoundedForm | None, device: str | torch.device) -> Tensor:
    """Return a buffer for a weight of ``shape`` without values."""
    if form is not None:
        return torch.empty(rounded_buffer.buffer_bytes(shape), dtype=torch.int8, device=device)
    rows, columns = packed_buffer.padded_shape(shape)
    return torch.empty(rows, columns // 16 * 9, dtype=torch.int16, device=device)
