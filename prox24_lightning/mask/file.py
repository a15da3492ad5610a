"""The file of record for masks: ``masks.safetensors``, one bit a weight, beside any dense checkpoint.

A safetensors file with one uint8 tensor a mask (:func:`~prox24_lightning.mask.pack_mask`) and, in its header, JSON: the
version, each mask's shape, the dimension of its groups and the SHA-256 of the weight that it belongs to, the writer's
own ``info``, and one SHA-256 over all of it. Reading runs no code. It takes memory for the masks, eight times the size
of the file, beside the file itself and some megabytes, and time in proportion; a changed bit anywhere that matters is
noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from prox24_lightning.mask.check import violations_24
from prox24_lightning.mask.packing import pack_mask, unpack_mask
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.safetensors_file import json_object, open_tensors, save_tensors
from prox24_lightning.weights.groups import Dim, check_weight, leave_graph

FORMAT = "prox24 masks"
VERSION = 1
MASKS_FILE = "masks.safetensors"
"""The usual name, beside the weights."""

MAX_DIMS, MAX_SIZE = 8, 2**31
"""Dimensions of a weight, and its size along one, at most: beside a size of 0 a file could claim any other."""


@dataclass(frozen=True)
class StoredMask:
    """One mask: bool, True stays; ``dim`` of its groups (a pair: both of its 4 x 4 blocks); ``weight_hash`` by
    :func:`hash_weight`, or None."""

    mask: Tensor
    dim: Dim
    weight_hash: str | None = None


@dataclass(frozen=True)
class MaskFile:
    """Content of a file: masks by the names of their weights, and the writer's own JSON."""

    masks: dict[str, StoredMask]
    info: dict[str, Any] = field(default_factory=dict)


def hash_weight(weight: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and values, whatever the device and the memory layout."""
    check_weight(weight, "hash_weight", vmap="one by one")
    leave_graph("hash_weight", "call it outside of the compiled function")
    return checksum([weight])


def write_masks(path: str | Path, masks: Mapping[str, StoredMask], info: Mapping[str, Any] | None = None) -> Path:
    """Write masks; a kill or a full disk leaves the old file or none.

    Args:
        path: of the file, whose folder exists.
        masks: by the names of their weights.
        info: whatever a reader should know (settings, step, versions); JSON values.

    Raises:
        ValueError: for a mask that is not 2:4 along its ``dim``.
        TypeError: for one that is not bool, or ``info`` that is not JSON.
        OSError: if the folder does not exist or the disk is full.
    """
    packed = {name: pack_mask(stored.mask).cpu() for name, stored in masks.items()}
    entries: dict[str, dict[str, Any]] = {}
    for name, stored in masks.items():
        entry = {"shape": list(stored.mask.shape), "dim": stored.dim, "weight_sha256": stored.weight_hash}
        _check_shape(name, entry["shape"])
        _check_pattern(name, stored.mask, stored.dim)
        entries[name] = entry
    header = {"version": str(VERSION), "masks": json.dumps(entries), "info": json.dumps(dict(info or {}))}
    save_tensors(path, packed, {"format": FORMAT, **header, "sha256": _checksum(header, sorted(packed), packed.get)})
    return Path(path)


def read_masks(path: str | Path) -> MaskFile:
    """Read what :func:`write_masks` wrote; masks are on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a masks file, is damaged or cut short, was written by a later version, or contradicts
            itself.
    """
    file, metadata = open_tensors(path, what="masks file", format=FORMAT, versions=(VERSION,))
    header = {key: metadata.get(key, "") for key in ("version", "masks", "info")}
    try:
        names = sorted(file.keys())
        found = _checksum(header, names, file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or forged: {error}") from error
    if found != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; fetch or write it again")
    try:
        entries, info = json_object(header["masks"]), json_object(header["info"])
        if sorted(entries) != names:
            raise ValueError(f"described are {sorted(entries)[:3]}, stored {names[:3]}")
        return MaskFile({name: _stored(name, entry, file.get_tensor(name)) for name, entry in entries.items()}, info)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is a forged or broken masks file: {error}") from error


def _checksum(header: Mapping[str, str], names: list[str], tensor: Callable[[str], Tensor | None]) -> str:
    """SHA-256 of the header and of each named tensor, which is held only while it counts."""

    def parts() -> Iterator[Any]:
        yield dict(header)
        for name in names:
            yield f"{name} "
            yield tensor(name)

    return checksum(parts())


def _stored(name: str, entry: Any, packed: Tensor) -> StoredMask:
    if not isinstance(entry, dict) or not {"shape", "dim", "weight_sha256"} <= set(entry):
        raise ValueError(f"{name} has no sound shape: {entry!r:.100}")
    shape, dim, weight_hash = entry["shape"], entry["dim"], entry["weight_sha256"]
    _check_shape(name, shape)
    if isinstance(dim, list) and len(dim) == 2 and all(type(one) is int for one in dim):
        dim = (dim[0], dim[1])  # JSON has no tuples
    elif type(dim) is not int:
        raise ValueError(f"{name} has no sound dim or hash: {entry!r:.100}")
    if not (weight_hash is None or isinstance(weight_hash, str)):
        raise ValueError(f"{name} has no sound dim or hash: {entry!r:.100}")
    if math.prod(shape) > 8 * packed.numel():
        raise ValueError(f"{name} claims shape {shape}, which {packed.numel()} bytes cannot hold")
    mask = unpack_mask(packed, shape)
    _check_pattern(name, mask, dim)
    return StoredMask(mask, dim, weight_hash)


def _check_shape(name: str, shape: Any) -> None:
    sizes = shape if isinstance(shape, list) and 1 <= len(shape) <= MAX_DIMS else [-1]
    if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in sizes):
        raise ValueError(f"{name} has no sound shape: {shape!r:.100}")


def _check_pattern(name: str, mask: Tensor, dim: Dim) -> None:
    try:
        broken = violations_24(mask, dim=dim, limit=0).count
    except ValueError as error:
        raise ValueError(f"the mask of {name}: {error}") from error
    if broken:
        raise ValueError(f"the mask of {name} is not 2:4 along dimension {dim}: {broken} groups keep more than two")
