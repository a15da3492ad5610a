"""Masks: choose one, check a weight against the pattern, store one bit a weight, in memory and in a file.

Names of :mod:`~prox24_lightning.mask.file` are imported when first used: the others need torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prox24_lightning.mask.check import Violations, is_24, violations_24, zeros_per_group
from prox24_lightning.mask.choose import mask_24
from prox24_lightning.mask.packing import pack_mask, unpack_mask
from prox24_lightning.mask.transposable import transposable_mask

if TYPE_CHECKING:
    from prox24_lightning.mask.file import MASKS_FILE, MaskFile, StoredMask, hash_weight, read_masks, write_masks

__all__ = [
    "MASKS_FILE",
    "MaskFile",
    "StoredMask",
    "Violations",
    "hash_weight",
    "is_24",
    "mask_24",
    "pack_mask",
    "read_masks",
    "transposable_mask",
    "unpack_mask",
    "violations_24",
    "write_masks",
    "zeros_per_group",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prox24_lightning.mask import file

    return getattr(file, name)
