"""The layout of ``packed.safetensors``: a state dict whose 2:4 weights take about half their size.

It is a safetensors file. A 2:4 weight ``w`` is two plain tensors, ``w.values`` and ``w.indices``
(:mod:`~prox24_lightning.convert.format.packed_weight`); every other tensor is stored as it is. The metadata of the
header, JSON strings, holds the shape of each packed weight and the dimension of its groups (``packed``), the names that
share one tensor (``aliases``), whatever the writer adds (``info``), a SHA-256 of each tensor (``hashes``), and one of
the header itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, padded_width, unpack_24
from prox24_lightning.utils.checksum import checksum

FORMAT = "prox24 packed"
VERSION = 1

HEADER_KEYS = ("version", "packed", "aliases", "hashes", "info")
"""The metadata that the header's own SHA-256 covers, with name, dtype and shape of every tensor."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


@dataclass(frozen=True)
class PackedEntry:
    """A packed weight: its shape as the model has it, and the dimension along which its groups of four lie."""

    shape: tuple[int, ...]
    dim: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the weight as it is packed: ``dim`` last, the others flattened."""
        return math.prod(self.shape[: self.dim] + self.shape[self.dim + 1 :]), self.shape[self.dim]

    def pack(self, weight: Tensor, name: str) -> PackedWeight:
        """Pack the weight as the matrix of :attr:`matrix`."""
        return pack_24(weight.movedim(self.dim, -1).reshape(self.matrix), name=name)

    def unpack(self, packed: PackedWeight, name: str) -> Tensor:
        """Undo :meth:`pack`; the result is contiguous."""
        moved = self.shape[: self.dim] + self.shape[self.dim + 1 :] + (self.shape[self.dim],)
        return unpack_24(packed, name=name).view(moved).movedim(-1, self.dim).contiguous()

    def layout(self, name: str, dtype: torch.dtype) -> Layout:
        """Return name, dtype and shape of the two tensors that store the weight."""
        rows, columns = self.matrix
        width = padded_width(columns)
        return {f"{name}.values": (dtype, (rows, width // 2)), f"{name}.indices": (torch.uint8, (rows, width // 8))}


def header_digest(metadata: Mapping[str, str], layout: Layout) -> str:
    """Return the SHA-256 of the metadata (:data:`HEADER_KEYS`) and the layout."""
    tensors = {name: (str(dtype), shape) for name, (dtype, shape) in layout.items()}
    return checksum([[dict(metadata), tensors]])


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors of a layout."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
