"""How a packed model lies in a file: ``packed.safetensors``, a state dict with its 2:4 weights at half the size.

A safetensors file. A 2:4 weight ``w`` is two plain tensors, ``w.values`` and ``w.indices``
(:mod:`~prox24_lightning.convert.format.weight`); every other tensor stands there as it is. The header says in JSON the
shape of each packed weight and the dimension of its groups, which names share one tensor, what the writer wants to say
(``info``), one SHA-256 a tensor, and one over the header's own words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prox24_lightning.convert.format.weight import PackedWeight, pack_24, padded_width, unpack_24
from prox24_lightning.utils.checksum import checksum

FORMAT = "prox24 packed"
VERSION = 1

SAID = ("version", "packed", "aliases", "hashes", "info")
"""The header's words that its own SHA-256 covers, with name, dtype and shape of every tensor."""

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
        """The weight as that matrix, packed."""
        return pack_24(weight.movedim(self.dim, -1).reshape(self.matrix), name=name)

    def unpack(self, packed: PackedWeight, name: str) -> Tensor:
        """Undo :meth:`pack`, with a contiguous result."""
        moved = self.shape[: self.dim] + self.shape[self.dim + 1 :] + (self.shape[self.dim],)
        return unpack_24(packed, name=name).view(moved).movedim(-1, self.dim).contiguous()

    def layout(self, name: str, dtype: torch.dtype) -> Layout:
        """The two tensors that hold the weight."""
        rows, columns = self.matrix
        width = padded_width(columns)
        return {f"{name}.values": (dtype, (rows, width // 2)), f"{name}.indices": (torch.uint8, (rows, width // 8))}


def header_digest(said: Mapping[str, str], layout: Layout) -> str:
    """SHA-256 of :data:`SAID` and the layout."""
    places = {name: (str(dtype), shape) for name, (dtype, shape) in layout.items()}
    return checksum([[dict(said), places]])


def layout_bytes(layout: Layout) -> int:
    """Bytes of all its tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
