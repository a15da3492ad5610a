"""The layout of ``packed.safetensors``: a state dict whose 2:4 weights take about half their size.

It is a safetensors file. A 2:4 weight ``w`` is two plain tensors, ``w.values`` and ``w.indices``
(:mod:`~prox24_lightning.convert.format.packed_weight`), and ``w.scales`` if it is rounded to 8 bits; every other tensor
is stored as it is. The metadata of the header, JSON strings, holds the shape of each packed weight and the dimension of
its groups, of a rounded one also the form, the dtype of the dense weight and the scale of its inputs if that is fixed
(``packed``), the names that share one tensor (``aliases``), whatever the writer adds (``info``), a SHA-256 of each
tensor (``hashes``), and one of the header itself. Rounded weights are in files of version 2, fixed scales of inputs in
those of version 3; files without are of version 1, which older releases read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, padded_width, unpack_24
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.safetensors_file import DTYPE_NAMES
from prox24_lightning.weights.rounding import LARGEST, VALUE_DTYPES, RoundedForm, round_weight

FORMAT = "prox24 packed"
VERSIONS = (1, 2, 3)
"""The versions that this release reads."""

HEADER_KEYS = ("version", "packed", "aliases", "hashes", "info")
"""The metadata that the header's own SHA-256 covers, with name, dtype and shape of every tensor."""

_ENTRY_KEYS = ("shape", "dim", "form", "dtype", "input_scale")
LARGEST_INPUT_SCALE = 2.0**100
"""Above it products of inputs would leave float32's range."""
_DENSE_DTYPES = {text: dtype for dtype, text in DTYPE_NAMES.items() if dtype.is_floating_point and dtype.itemsize > 1}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


@dataclass(frozen=True)
class PackedEntry:
    """A packed weight.

    Attributes:
        shape: as the model has it.
        dim: the dimension along which its groups of four lie.
        form: of a rounded weight, else None.
        dtype: of the dense weight if it is rounded, else None.
        input_scale: of a rounded weight whose inputs have a fixed scale, else None.
    """

    shape: tuple[int, ...]
    dim: int
    form: RoundedForm | None = None
    dtype: torch.dtype | None = None
    input_scale: float | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the weight as it is packed: ``dim`` last, the others flattened."""
        return math.prod(self.shape[: self.dim] + self.shape[self.dim + 1 :]), self.shape[self.dim]

    def pack(self, weight: Tensor, name: str) -> PackedWeight:
        """Pack the weight as the matrix of :attr:`matrix`."""
        packed = pack_24(weight.movedim(self.dim, -1).reshape(self.matrix), form=self.form, name=name)
        return replace(packed, input_scale=self.input_scale)

    def rounded(self, weight: Tensor, name: str) -> Tensor:
        """Return the weight that :meth:`unpack` gives back, made without packing."""
        if self.form is None:
            return weight
        rounded = round_weight(weight.movedim(self.dim, -1).reshape(self.matrix), self.form, name=name)
        return rounded.view(self._moved).movedim(-1, self.dim)

    def packed_weight(self, values: Tensor, indices: Tensor, scales: Tensor | None) -> PackedWeight:
        """Return the packed weight of the tensors that store it."""
        return PackedWeight(values, indices, self.matrix, scales, self.dtype, self.input_scale)

    def unpack(self, packed: PackedWeight, name: str) -> Tensor:
        """Undo :meth:`pack`; the result is contiguous."""
        moved = unpack_24(packed, name=name).view(self._moved).movedim(-1, self.dim)
        # The usual strides, also where a size of 1 leaves a choice: convolutions choose their kernel by them.
        return moved.clone(memory_format=torch.contiguous_format)

    @property
    def _moved(self) -> tuple[int, ...]:
        return self.shape[: self.dim] + self.shape[self.dim + 1 :] + (self.shape[self.dim],)

    def layout(self, name: str, dtype: torch.dtype) -> Layout:
        """Return name, dtype and shape of the tensors that store the weight; ``dtype`` is that of one not rounded."""
        rows, columns = self.matrix
        width = padded_width(columns)
        stored = dtype if self.form is None else VALUE_DTYPES[self.form]
        layout: Layout = {
            f"{name}.values": (stored, (rows, width // 2)),
            f"{name}.indices": (torch.uint8, (rows, width // 8)),
        }
        return layout if self.form is None else layout | {f"{name}.scales": (torch.float32, (rows,))}

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the header."""
        entry: dict[str, Any] = {"shape": self.shape, "dim": self.dim}
        if self.dtype is not None:
            entry |= {"form": self.form, "dtype": DTYPE_NAMES[self.dtype]}
        return entry if self.input_scale is None else entry | {"input_scale": self.input_scale}

    @classmethod
    def from_json(cls, name: str, entry: Any) -> PackedEntry:
        """Read an entry of an untrusted header; ``name`` is the weight's.

        Raises:
            ValueError: if it is none.
        """
        known = isinstance(entry, dict)
        shape, dim, form, dtype, scale = map(entry.get, _ENTRY_KEYS) if known else [None] * len(_ENTRY_KEYS)
        if not (
            isinstance(shape, list)
            and all(type(size) is int and size >= 0 for size in shape)
            and type(dim) is int
            and 0 <= dim < len(shape)
            and len(shape) >= 2
        ):
            raise ValueError(f"{name} has no valid shape or dim: {entry!r:.100}")
        if form is None and dtype is None and scale is None:
            return cls(tuple(shape), dim)
        if form not in tuple(LARGEST) or dtype not in tuple(_DENSE_DTYPES):
            raise ValueError(f"{name} has no valid form or dtype: {entry!r:.100}")
        if scale is not None and not is_input_scale(scale):
            raise ValueError(f"{name} has no valid scale of its inputs: {entry!r:.100}")
        return cls(tuple(shape), dim, form, _DENSE_DTYPES[dtype], scale)


def is_input_scale(scale: Any) -> bool:
    """Return whether an entry may hold this scale of its weight's inputs."""
    return type(scale) is float and 0 < scale < LARGEST_INPUT_SCALE


def version_of(entries: Iterable[PackedEntry]) -> int:
    """Return the version of the format that a file with these packed weights needs."""
    return max((1 if entry.form is None else 2 if entry.input_scale is None else 3 for entry in entries), default=1)


def header_digest(metadata: Mapping[str, str], layout: Layout) -> str:
    """Return the SHA-256 of the metadata (:data:`HEADER_KEYS`) and the layout."""
    tensors = {name: (str(dtype), shape) for name, (dtype, shape) in layout.items()}
    return checksum([[dict(metadata), tensors]])


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors of a layout."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
