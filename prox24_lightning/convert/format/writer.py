"""Write a packed model tensor by tensor: it takes no more memory than the largest weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prox24_lightning.convert.format.header import (
    FORMAT,
    LARGEST_INPUT_SCALE,
    Layout,
    PackedEntry,
    header_digest,
    is_input_scale,
    version_of,
)
from prox24_lightning.convert.format.packed_weight import PACKED_DTYPES
from prox24_lightning.utils.checksum import checksum, tensor_bytes
from prox24_lightning.utils.files import replacing
from prox24_lightning.utils.safetensors_file import DTYPE_NAMES, TensorWriter
from prox24_lightning.weights.rounding import LARGEST, RoundedForm


def write_packed(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int],
    info: Mapping[str, Any] | None = None,
    forms: Mapping[str, RoundedForm] | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> Path:
    """Write a state dict with some of its weights packed; a kill or a full disk leaves the old file, or none.

    Args:
        path: of the file, whose folder exists.
        tensors: a state dict, on any devices. Names that share one tensor (tied weights) share it in the file.
        dims: the weights to pack, and the dimension along which the groups of each lie.
        info: whatever a reader should know; JSON values.
        forms: the packed weights that are rounded to 8 bits, with a scale for each row of the packed matrix.
        input_scales: fixed scales of the inputs of rounded weights.

    Raises:
        ValueError: for a weight that is not 2:4 along its dimension, with its first violations; for a row that cannot
            be rounded; for an unknown form, or that of a weight that is not packed; for a scale of inputs out of range,
            or that of a weight that is not rounded; for a tensor without values or of a type that safetensors does not
            know; for an entry that is no tensor (a module's extra state); for names that collide.
        TypeError: for a weight whose dtype cannot be packed, or ``info`` that is not JSON.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__} and no tensor (extra state of a module): a packed file holds "
                "tensors only, so take it out of the state dict and keep it elsewhere"
            )
    aliases, owners = _split_aliases(tensors)
    forms = forms or {}
    if unknown := sorted(set(forms) - set(dims)):
        raise ValueError(f"{unknown[0]} is to be rounded and is not packed: only packed weights are rounded")
    fixed = input_scales or {}
    if unknown := sorted(set(fixed) - set(forms)):
        raise ValueError(f"{unknown[0]} has a scale for its inputs and is not rounded: leave the scale out")
    if unknown := sorted(name for name, form in forms.items() if form not in LARGEST):
        raise ValueError(f"{unknown[0]} cannot be rounded to {forms[unknown[0]]!r}, only to {', '.join(LARGEST)}")
    fixed = {name: float(scale) for name, scale in fixed.items()}
    for name, scale in fixed.items():
        if not is_input_scale(scale):
            raise ValueError(
                f"{name}: the scale {scale} of its inputs must lie above 0 and below {LARGEST_INPUT_SCALE:g}: leave it "
                "out, and each token has its own"
            )
    entries = {name: _entry(name, owners, dim, forms.get(name), fixed.get(name)) for name, dim in dims.items()}
    layout: Layout = {}
    for name, tensor in owners.items():
        parts = entries[name].layout(name, tensor.dtype) if name in entries else {}
        for part, description in (parts or {name: (tensor.dtype, tuple(tensor.shape))}).items():
            if part in layout or tensor.is_meta or tensor.dtype not in DTYPE_NAMES or hasattr(tensor, "placements"):
                raise ValueError(
                    f"{name}: {tensor.dtype} {type(tensor).__name__} on {tensor.device} cannot be stored as {part!r}: "
                    "it has no values, is sharded, or the type or the name is not possible"
                )
            layout[part] = description
    hashes = dict.fromkeys(layout, "0" * 64)
    header = {
        "version": str(version_of(entries.values())),
        "packed": json.dumps({name: entry.to_json() for name, entry in entries.items()}),
        "aliases": json.dumps(aliases),
        "hashes": json.dumps(hashes),
        "info": json.dumps(dict(info or {})),
    }
    with (
        replacing(path) as temporary,
        TensorWriter(temporary, layout, {"format": FORMAT, **header, "sha256": "0" * 64}) as writer,
    ):
        for name, tensor in owners.items():
            for part, content in _parts(name, tensor, entries.get(name)).items():
                hashes[part] = checksum([tensor_bytes(content)])
                writer.write(part, content)
        header["hashes"] = json.dumps(hashes)
        writer.finish({**header, "sha256": header_digest(header, layout)})
    return Path(path)


def _split_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return alias -> owner, and the owners: names of one memory, with one shape and stride, are one tensor."""
    aliases: dict[str, str] = {}
    owners: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "placements") or not tensor.numel():
            owners[name] = tensor
            continue
        memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if memory in seen:
            aliases[name] = seen[memory]
        else:
            owners[name] = tensor
            seen[memory] = name
    return aliases, owners


def _entry(
    name: str, owners: Mapping[str, Tensor], dim: int, form: RoundedForm | None, input_scale: float | None
) -> PackedEntry:
    if name not in owners:
        raise ValueError(f"there is no tensor {name!r} to pack, or it is tied: name the first of its names")
    shape = tuple(owners[name].shape)
    if len(shape) < 2 or not 0 <= dim < len(shape):
        raise ValueError(f"{name} of shape {shape} has no groups along dimension {dim}")
    if owners[name].dtype not in PACKED_DTYPES:
        raise TypeError(f"{name}: {owners[name].dtype} cannot be packed")
    return PackedEntry(shape, dim) if form is None else PackedEntry(shape, dim, form, owners[name].dtype, input_scale)


def _parts(name: str, tensor: Tensor, entry: PackedEntry | None) -> Mapping[str, Tensor]:
    if entry is None:
        return {name: tensor}
    packed = entry.pack(tensor, name)
    parts = {f"{name}.values": packed.values, f"{name}.indices": packed.indices}
    return parts if packed.scales is None else parts | {f"{name}.scales": packed.scales}
