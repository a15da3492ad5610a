"""Hold a frozen mask while training goes on, write it beside the weights, and take it up again elsewhere."""

from prox24_lightning.finetune.lora import MaskedLora
from prox24_lightning.finetune.masked import MaskedParameters
from prox24_lightning.finetune.record import load_masks, save_masks

__all__ = ["MaskedLora", "MaskedParameters", "load_masks", "save_masks"]
