"""Hold a frozen mask while training goes on."""

from prox24_lightning.finetune.masked import MaskedParameters

__all__ = ["MaskedParameters"]
