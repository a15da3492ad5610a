"""Read a packed model: opening the file checks its header, and each tensor is checked when it is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from prox24_lightning.convert.format.header import (
    FORMAT,
    HEADER_KEYS,
    VERSIONS,
    PackedEntry,
    header_digest,
    layout_bytes,
    version_of,
)
from prox24_lightning.convert.format.packed_weight import PackedWeight, check_packed
from prox24_lightning.utils.checksum import checksum, tensor_bytes
from prox24_lightning.utils.safetensors_file import DTYPE_NAMES, json_object, open_tensors

_KNOWN = {text: dtype for dtype, text in DTYPE_NAMES.items()}

_CHECKED_AT_ONCE = 8
"""Tensors: SHA-256 takes about two seconds a gigabyte on one core, and lets other threads work."""


class PackedFile:
    """An open packed file with a checked header; tensors are read on demand.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no packed file, is damaged or cut short, was written by a later version, or its header
            contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle, metadata = open_tensors(path, what="packed file", format=FORMAT, versions=VERSIONS)
        stored: set[str] = set(self._handle.keys())
        header = {key: metadata.get(key, "") for key in HEADER_KEYS}
        self._layout = {name: self._describe(name) for name in stored}
        if header_digest(header, self._layout) != metadata.get("sha256"):
            raise ValueError(f"{path} is damaged: its checksum does not fit its header; fetch or write it again")
        try:
            self.info = json_object(header["info"])
            self._hashes = json_object(header["hashes"])
            self._aliases = json_object(header["aliases"])
            self.packed = {
                name: PackedEntry.from_json(name, entry) for name, entry in json_object(header["packed"]).items()
            }
            if version_of(self.packed.values()) > int(header["version"]):
                what = "fixed scales of inputs" if int(header["version"]) > 1 else "rounded weights"
                raise ValueError(f"{what} are not in files of version {header['version']}")
            self._check_header(stored)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is a forged or broken packed file: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the state dict, sorted; all names of tied weights are among them."""
        return tuple(sorted({*self.packed, *self._dense, *self._aliases}))

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the tensors in the file: two for each packed weight, three for one that is rounded."""
        return tuple(sorted(self._layout))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors as a dense state dict."""
        whole = {name: (self.dtype(name), entry.shape) for name, entry in self.packed.items()}
        return layout_bytes(whole | {name: self._layout[name] for name in self._dense})

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return layout_bytes(self._layout)

    def owner(self, name: str) -> str:
        """Return the name under which the tensor is stored: for a tied weight the first of its names."""
        return self._aliases.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the state dict."""
        name = self.owner(name)
        return self.packed[name].shape if name in self.packed else self._layout[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the state dict."""
        name = self.owner(name)
        if name not in self.packed:
            return self._layout[name][0]
        return self.packed[name].dtype or self._layout[f"{name}.values"][0]

    def read_packed(self, name: str, device: torch.device | str = "cpu") -> PackedWeight:
        """Read a packed weight, as the matrix of :attr:`PackedEntry.matrix`.

        Raises:
            KeyError: if ``name`` is not a packed weight.
            ValueError: if its tensors are damaged.
        """
        name = self.owner(name)
        entry = self.packed[name]
        values, indices = (self._read(f"{name}.{part}") for part in ("values", "indices"))
        packed = entry.packed_weight(values, indices, None if entry.form is None else self._read(f"{name}.scales"))
        try:
            check_packed(packed, name=name)
        except ValueError as error:
            raise ValueError(f"{self.path} is a forged or broken packed file: {error}") from error
        return packed.to(device)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor of the state dict, dense; a packed weight is expanded on ``device``.

        Raises:
            KeyError: if there is no such name.
            ValueError: if it is damaged.
        """
        name = self.owner(name)
        if name in self.packed:
            return self.packed[name].unpack(self.read_packed(name, device), name)
        if name not in self._dense:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        return self._read(name).to(device)

    def state_dict(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read everything, dense; tied names share one tensor."""
        found: dict[str, Tensor] = {}
        for name in self.names:
            if self.owner(name) == name:
                found[name] = self.read(name, device)
        return {name: found[self.owner(name)] for name in self.names}

    def check_tensors(self) -> None:
        """Check the checksum of every tensor, some at a time: for readers that take the tensors by other ways.

        Raises:
            ValueError: for a damaged tensor, with the file and its name.
        """
        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as threads:
            for _ in threads.map(lambda name: self._read(name) is None, self.stored_names):
                pass

    def _describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        view = self._handle.get_slice(name)
        if view.get_dtype() not in _KNOWN:
            raise ValueError(f"{self.path}: {name} is of type {view.get_dtype()}, which no packed file holds")
        return _KNOWN[view.get_dtype()], tuple(view.get_shape())

    def _read(self, part: str) -> Tensor:
        try:
            tensor = self._handle.get_tensor(part)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: {part} cannot be read: {error}") from error
        if checksum([tensor_bytes(tensor)]) != self._hashes[part]:
            raise ValueError(f"{self.path} is damaged: the checksum of {part} does not fit; fetch or write it again")
        return tensor

    def _check_header(self, stored: set[str]) -> None:
        accounted: set[str] = set()
        for name, entry in self.packed.items():
            parts = entry.layout(name, self._layout.get(f"{name}.values", (torch.uint8, ()))[0])
            if any(self._layout.get(part) != expected for part, expected in parts.items()):
                found = {part: self._layout.get(part) for part in parts}
                raise ValueError(f"{name} of shape {entry.shape!s:.100} does not fit what is stored: {found}")
            accounted |= set(parts)
        self._dense = stored - accounted
        if set(self._hashes) != stored:
            raise ValueError(f"hashes are given for {sorted(self._hashes)[:3]}, stored are {sorted(stored)[:3]}")
        whole = self._dense | set(self.packed)
        for alias, owner in self._aliases.items():
            if not isinstance(owner, str) or owner not in whole or alias in whole:
                raise ValueError(f"{alias:.100} shares the tensor {owner!r:.100}, which is not stored")
