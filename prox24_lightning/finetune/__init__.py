"""Train on under a frozen mask, and learn from the dense model meanwhile."""

from prox24_lightning.finetune.distillation import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distiller import Distiller, OutputLoss, find_student
from prox24_lightning.finetune.masked import MaskedParameters
from prox24_lightning.finetune.teacher import frozen_copy, memory_bytes, same_weights, weights_checksum
from prox24_lightning.finetune.time_share import Share, TimeShare

__all__ = [
    "Distiller",
    "MaskedParameters",
    "OutputLoss",
    "Share",
    "TimeShare",
    "distillation_loss",
    "feature_loss",
    "find_student",
    "frozen_copy",
    "logits_of",
    "memory_bytes",
    "same_weights",
    "squared_error",
    "weights_checksum",
]
