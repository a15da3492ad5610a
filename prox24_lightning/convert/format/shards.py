"""A packed model in one file or in several, read and written as one state dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.utils.files import PACKED_FILE, PACKED_INDEX, write_text
from prox24_lightning.utils.safetensors_file import json_object
from prox24_lightning.weights.rounding import RoundedForm

_LONGEST_NAME = 255  # of a file


class PackedModel:
    """The packed files of one model, with the interface of :class:`PackedFile`.

    Args:
        files: open ones; no tensor is in two of them.
        path: of the file that names them, for messages.

    Attributes:
        packed: packed weights by name.

    Raises:
        ValueError: if two files hold a tensor of one name.
    """

    def __init__(self, files: list[PackedFile], path: str | Path) -> None:
        self.files = files
        self.path = Path(path)
        self.packed = {name: entry for file in files for name, entry in file.packed.items()}
        self._file_of: dict[str, PackedFile] = {}
        for file in files:
            for name in file.names:
                if name in self._file_of:
                    raise ValueError(f"{name} is in {self._file_of[name].path} and in {file.path}: remove one of them")
                self._file_of[name] = file

    @property
    def info(self) -> dict[str, Any]:
        """What the writer added."""
        return self.files[0].info

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the state dict, sorted."""
        return tuple(sorted(self._file_of))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors as a dense state dict."""
        return sum(file.dense_bytes for file in self.files)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(file.stored_bytes for file in self.files)

    def owner(self, name: str) -> str:
        """Return the name under which the tensor is stored: for a tied weight the first of its names."""
        return self._of(name).owner(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the state dict."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the state dict."""
        return self._of(name).dtype(name)

    def read_packed(self, name: str, device: torch.device | str = "cpu") -> PackedWeight:
        """Read a packed weight; see :meth:`PackedFile.read_packed`."""
        return self._of(name).read_packed(name, device)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor, dense; see :meth:`PackedFile.read`."""
        return self._of(name).read(name, device)

    def state_dict(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read everything, dense; tied names hold one tensor."""
        return {name: tensor for file in self.files for name, tensor in file.state_dict(device).items()}

    def check_tensors(self) -> None:
        """Check the checksum of every tensor; see :meth:`PackedFile.check_tensors`."""
        for file in self.files:
            file.check_tensors()

    def _of(self, name: str) -> PackedFile:
        if name not in self._file_of:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        return self._file_of[name]


def open_packed(path: str | Path) -> PackedModel:
    """Open a packed model: a file, an index, or a folder with either.

    Raises:
        FileNotFoundError: if there is no such file, or one that the index names is missing.
        ValueError: if a file is damaged, or the index is none or does not list what its files hold.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (PACKED_INDEX if (path / PACKED_INDEX).is_file() else PACKED_FILE)
    if path.name != PACKED_INDEX:
        return PackedModel([PackedFile(path)], path)
    try:
        weight_map = json_object(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or not all(_is_file_name(name) for name in names):
            raise ValueError("it names no files of its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of packed files: {error}; fetch or write the folder again") from error
    files = [PackedFile(path.parent / name) for name in names]
    stored = {tensor: file.path.name for file in files for tensor in file.stored_names}
    if differing := {tensor for tensor, _ in stored.items() ^ weight_map.items()}:
        raise ValueError(
            f"{path} and its files do not belong together, they differ in {min(differing):.100}: fetch or write the "
            "folder again"
        )
    return PackedModel(files, path)


def _is_file_name(name: str) -> bool:
    """Return whether a name from an index is one of a file beside it."""
    return Path(name).name == name and name.endswith(".safetensors") and len(name) <= _LONGEST_NAME


def write_packed_files(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int],
    info: Mapping[str, Any],
    max_bytes: int | None = None,
    forms: Mapping[str, RoundedForm] | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> PackedModel:
    """Write a state dict packed into ``folder``: one file, or several with an index.

    Args:
        folder: that exists.
        tensors, dims, info, forms, input_scales: see :func:`~prox24_lightning.convert.format.writer.write_packed`.
        max_bytes: of the dense tensors of one file; None writes one file. A larger tensor has a file of its own.

    Raises:
        ValueError, TypeError: as ``write_packed``.
    """
    groups = [list(tensors)] if max_bytes is None else _split(tensors, max_bytes)
    if len(groups) == 1:
        return open_packed(write_packed(Path(folder) / PACKED_FILE, tensors, dims, info, forms, input_scales))
    weight_map: dict[str, str] = {}
    files: list[PackedFile] = []
    for number, names in enumerate(groups, start=1):
        path = Path(folder) / f"{Path(PACKED_FILE).stem}-{number:05}-of-{len(groups):05}.safetensors"
        members = {name: dims[name] for name in names if name in dims}
        rounded = {name: form for name, form in (forms or {}).items() if name in members}
        fixed = {name: scale for name, scale in (input_scales or {}).items() if name in members}
        written = write_packed(path, {name: tensors[name] for name in names}, members, info, rounded, fixed)
        files.append(PackedFile(written))
        weight_map |= dict.fromkeys(files[-1].stored_names, path.name)
    total = sum(file.stored_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(Path(folder) / PACKED_INDEX, json.dumps(index, indent=2) + "\n")
    return open_packed(Path(folder) / PACKED_INDEX)


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Return the names in groups of at most ``max_bytes``, in order; names of one tensor stay together."""
    groups: list[list[str]] = [[]]
    size = 0
    home: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() in home and tensor.numel():
            home[tensor.data_ptr()].append(name)
            continue
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
        home[tensor.data_ptr()] = groups[-1]
    return groups
