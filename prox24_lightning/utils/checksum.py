"""One checksum for all: SHA-256 of tensors, text and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def checksum(parts: Iterable[Any]) -> str:
    """Return the SHA-256 of ``parts``, one after the other, as 64 hexadecimal digits.

    Args:
        parts: taken one at a time, so that a generator holds one tensor in memory. Of a tensor dtype, shape and values
            count, whatever its device and memory layout; of text its UTF-8; of bytes themselves; of anything else its
            JSON with sorted keys.

    Raises:
        TypeError: for a part that is none of these.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(tensor_bytes(part))
        elif isinstance(part, str):
            digest.update(part.encode())
        elif isinstance(part, (bytes, bytearray, memoryview)):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major: a view of its memory where it is contiguous and on the CPU."""
    return tensor.detach().cpu().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data
