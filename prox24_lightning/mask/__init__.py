"""Masks: choose one, check a weight against the pattern, store one bit a weight."""

from prox24_lightning.mask.check import Violations, is_24, violations_24, zeros_per_group
from prox24_lightning.mask.choose import mask_24
from prox24_lightning.mask.packing import pack_mask, unpack_mask
from prox24_lightning.mask.transposable import transposable_mask

__all__ = [
    "Violations",
    "is_24",
    "mask_24",
    "pack_mask",
    "transposable_mask",
    "unpack_mask",
    "violations_24",
    "zeros_per_group",
]
