"""Safetensors files of a named format and version: opened with clear refusals, or written tensor by tensor.

The library's own writer takes all tensors at once, and raises its own ``SafetensorError`` on a full disk.
:class:`TensorWriter` needs one tensor at a time and raises ``OSError``: the format is eight bytes of header length, a
JSON header with every tensor's dtype, shape and place, then the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prox24_lightning.utils.checksum import tensor_bytes
from prox24_lightning.utils.files import replacing

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that safetensors gives to the dtypes that are written."""


def open_tensors(path: str | Path, *, what: str, format: str, versions: Sequence[int]) -> tuple[Any, dict[str, str]]:
    """Open a safetensors file without reading its tensors.

    Args:
        path: of the file.
        what: the kind of file, for errors.
        format: required value of its metadata.
        versions: those that can be read.

    Returns:
        the library's handle and the metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another kind, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    try:
        handle = safe_open(str(path), framework="pt")
        metadata = handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors, it is damaged or another kind of file: {error}"
        ) from error
    if metadata.get("format") != format:
        raise ValueError(f"{path} is no {what} of prox24_lightning (its format is {metadata.get('format')!r:.50})")
    if metadata.get("version") not in [str(version) for version in versions]:
        raise ValueError(
            f"{path} is of version {metadata.get('version')!r:.50}, this release reads "
            f"{', '.join(map(str, versions))}; update prox24_lightning"
        )
    return handle, metadata


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object from an untrusted file.

    Raises:
        ValueError: for anything else, nesting too deep for the parser included.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"its JSON is no object: {text[:50]!r}")
    return value


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` by name and ``metadata`` as a safetensors file, whole or not at all.

    One tensor at a time is copied to the CPU.

    Raises:
        OSError: if the folder does not exist or the disk is full; ``path`` is then as it was before.
        ValueError: for a dtype outside :data:`DTYPE_NAMES`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: a safetensors file cannot hold {tensor.dtype}")
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as temporary, TensorWriter(temporary, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish({})


class TensorWriter:
    """Write a safetensors file whose tensors come one by one, in any order; each must come once.

    Args:
        path: of the file, which is overwritten; :func:`~prox24_lightning.utils.files.replacing` makes it atomic.
        layout: name -> (dtype, shape) of every tensor.
        metadata: strings. Those given again to :meth:`finish` must have the same length as here.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._layout = dict(layout)
        self._metadata = dict(metadata)
        self._places: dict[str, tuple[int, int]] = {}
        # Wide types first, so that every tensor begins at a multiple of its own width, as the library has it.
        at = 0
        for name in sorted(self._layout, key=lambda name: -self._layout[name][0].itemsize):
            dtype, shape = self._layout[name]
            end = at + dtype.itemsize * math.prod(shape)
            self._places[name] = at, end
            at = end
        self._missing = set(self._layout)
        self._start = len(self._header())
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its place; it may be on any device."""
        dtype, shape = self._layout[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or name not in self._missing:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced, or came twice")
        self._missing.remove(name)
        self._file.seek(self._start + self._places[name][0])
        self._file.write(tensor_bytes(tensor))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, its ``metadata`` now final."""
        self._metadata.update(metadata)
        header = self._header()
        if self._missing or len(header) != self._start:
            raise ValueError(f"missing are {sorted(self._missing)[:3]}, header {len(header)} of {self._start} bytes")
        self._file.seek(0)
        self._file.write(header)

    def _header(self) -> bytes:
        tensors = {
            name: {"dtype": DTYPE_NAMES[self._layout[name][0]], "shape": self._layout[name][1], "data_offsets": place}
            for name, place in self._places.items()
        }
        text = json.dumps({"__metadata__": self._metadata, **tensors}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
