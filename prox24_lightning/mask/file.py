"""The file of record for masks: ``masks.safetensors``, one bit a weight, beside any dense checkpoint.

A safetensors file with one uint8 tensor a mask (:func:`~prox24_lightning.mask.pack_mask`) and, in its header, JSON: the
version, each mask's shape, the dimension of its groups and the SHA-256 of the weight that it belongs to, what the
writer wants to say (``info``), and one SHA-256 over all of it. Reading it runs no code and allocates no more than eight
times the size of the file; a changed bit anywhere that matters is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prox24_lightning.mask.check import violations_24
from prox24_lightning.mask.packing import pack_mask, unpack_mask
from prox24_lightning.utils.files import replacing
from prox24_lightning.utils.safetensors_file import json_object, open_tensors, tensor_bytes
from prox24_lightning.weights.groups import Dim

FORMAT = "prox24 masks"
VERSION = 1
MASKS_FILE = "masks.safetensors"
"""The usual name, beside the weights."""


@dataclass(frozen=True)
class StoredMask:
    """One mask: bool, True stays; ``dim`` of its groups (a pair: both of its 4 x 4 blocks); ``weight_hash`` by
    :func:`hash_weight`, or None."""

    mask: Tensor
    dim: Dim
    weight_hash: str | None = None


@dataclass(frozen=True)
class MaskFile:
    """What a file holds: masks by the names of their weights, and the writer's own JSON."""

    masks: dict[str, StoredMask]
    info: dict[str, Any] = field(default_factory=dict)


def hash_weight(weight: Tensor) -> str:
    """SHA-256 of dtype, shape and values, whatever the device and the memory layout."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def write_masks(path: str | Path, masks: Mapping[str, StoredMask], info: Mapping[str, Any] | None = None) -> Path:
    """Write masks; a kill or a full disk leaves the old file or none.

    Args:
        path: of the file, whose folder exists.
        masks: by the names of their weights.
        info: whatever a reader should know (settings, step, versions); JSON values.

    Raises:
        ValueError: for a mask that is not 2:4 along its ``dim``.
        TypeError: for one that is not bool, or ``info`` that is not JSON.
    """
    packed = {name: pack_mask(stored.mask).cpu() for name, stored in masks.items()}
    entries: dict[str, dict[str, Any]] = {}
    for name, stored in masks.items():
        _check_pattern(name, stored.mask, stored.dim)
        entries[name] = {"shape": list(stored.mask.shape), "dim": stored.dim, "weight_sha256": stored.weight_hash}
    said = {"version": str(VERSION), "masks": json.dumps(entries), "info": json.dumps(dict(info or {}))}
    metadata = {"format": FORMAT, **said, "sha256": _digest(said, packed)}
    with replacing(path) as temporary:
        save_file(packed, str(temporary), metadata=metadata)
    return Path(path)


def read_masks(path: str | Path) -> MaskFile:
    """Read what :func:`write_masks` wrote; masks are on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a masks file, is damaged or cut short, was written by a later version, or says things
            that cannot be true.
    """
    file, metadata = open_tensors(path, what="masks file", format=FORMAT, version=VERSION)
    try:
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or forged: {error}") from error
    said = {key: metadata.get(key, "") for key in ("version", "masks", "info")}
    if _digest(said, packed) != metadata.get("sha256"):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content; fetch or write it again")
    try:
        entries, info = json_object(said["masks"]), json_object(said["info"])
        if set(entries) != set(packed):
            raise ValueError(f"described are {sorted(entries)[:3]}, stored {sorted(packed)[:3]}")
        return MaskFile({name: _stored(name, entry, packed[name]) for name, entry in entries.items()}, info)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is a forged or broken masks file: {error}") from error


def _stored(name: str, entry: Any, packed: Tensor) -> StoredMask:
    shape, dim, weight_hash = (
        (entry[key] for key in ("shape", "dim", "weight_sha256")) if _complete(entry) else (0, 0, 0)
    )
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has no sound shape: {entry!r:.100}")
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


def _complete(entry: Any) -> bool:
    return isinstance(entry, dict) and {"shape", "dim", "weight_sha256"} <= set(entry)


def _check_pattern(name: str, mask: Tensor, dim: Dim) -> None:
    try:
        broken = violations_24(mask, dim=dim, limit=0).count
    except ValueError as error:
        raise ValueError(f"the mask of {name}: {error}") from error
    if broken:
        raise ValueError(f"the mask of {name} is not 2:4 along dimension {dim}: {broken} groups keep more than two")


def _digest(said: Mapping[str, str], packed: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode())
    for name in sorted(packed):
        digest.update(f"{name} {packed[name].dtype} {tuple(packed[name].shape)}".encode())
        digest.update(tensor_bytes(packed[name]))
    return digest.hexdigest()
