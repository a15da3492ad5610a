"""Train on under a frozen mask, here or elsewhere, and learn from the dense model meanwhile."""

from prox24_lightning.finetune.distillation import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distiller import Distiller, OutputLoss, find_student
from prox24_lightning.finetune.lora import MaskedLora
from prox24_lightning.finetune.masked import MaskedParameters
from prox24_lightning.finetune.record import load_masks, save_masks
from prox24_lightning.finetune.teacher import frozen_copy, memory_bytes, same_weights, weights_checksum
from prox24_lightning.finetune.time_share import Share, TimeShare

__all__ = [
    "Distiller",
    "MaskedLora",
    "MaskedParameters",
    "OutputLoss",
    "Share",
    "TimeShare",
    "distillation_loss",
    "feature_loss",
    "find_student",
    "frozen_copy",
    "load_masks",
    "logits_of",
    "memory_bytes",
    "same_weights",
    "save_masks",
    "squared_error",
    "weights_checksum",
]
