"""Train on under frozen masks, with the dense model as a teacher if asked for."""

from prox24_lightning.finetune.distillation.batch_timer import BatchTimer, TimeShare
from prox24_lightning.finetune.distillation.config import DistillationConfig
from prox24_lightning.finetune.distillation.losses import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distillation.paired_blocks import pair_blocks
from prox24_lightning.finetune.distillation.student import find_student
from prox24_lightning.finetune.distillation.teacher import (
    load_weights,
    memory_bytes,
    names_24,
    same_weights,
    shard_like,
    weights_checksum,
)
from prox24_lightning.finetune.distillation.teacher_comparison import OutputLoss, TeacherComparison
from prox24_lightning.finetune.lora import MaskedLora
from prox24_lightning.finetune.mask_files import load_masks, save_masks
from prox24_lightning.finetune.masked_parameters import MaskedParameters
from prox24_lightning.finetune.parameter_groups import parameter_groups
from prox24_lightning.utils.module_copy import frozen_copy

__all__ = [
    "BatchTimer",
    "DistillationConfig",
    "MaskedLora",
    "MaskedParameters",
    "OutputLoss",
    "TeacherComparison",
    "TimeShare",
    "distillation_loss",
    "feature_loss",
    "find_student",
    "frozen_copy",
    "load_masks",
    "load_weights",
    "logits_of",
    "memory_bytes",
    "names_24",
    "pair_blocks",
    "parameter_groups",
    "same_weights",
    "save_masks",
    "shard_like",
    "squared_error",
    "weights_checksum",
]
