"""Masks: choose one, check a weight against the pattern, store one bit a weight, in memory and in a file."""

from prox24_lightning.mask.check import Violations, is_24, violations_24, zeros_per_group
from prox24_lightning.mask.choose import mask_24
from prox24_lightning.mask.file import MASKS_FILE, MaskFile, StoredMask, hash_weight, read_masks, write_masks
from prox24_lightning.mask.packing import pack_mask, unpack_mask
from prox24_lightning.mask.transposable import transposable_mask

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
