"""Train on under a frozen mask, here or elsewhere, and learn from the dense model meanwhile."""

from prox24_lightning.finetune.distillation.losses import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distillation.step import Distiller, OutputLoss, find_student
from prox24_lightning.finetune.distillation.teacher import memory_bytes, same_weights, weights_checksum
from prox24_lightning.finetune.distillation.time_share import Share, TimeShare
from prox24_lightning.finetune.lora import MaskedLora
from prox24_lightning.finetune.mask_files import load_masks, save_masks
from prox24_lightning.finetune.masked_parameters import MaskedParameters
from prox24_lightning.utils.module_copy import frozen_copy

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
