"""Hugging Face transformers: the same sparsification in a ``transformers.Trainer``."""

from prox24_lightning.integrations.transformers.trainer_callback import Prox24TrainerCallback

__all__ = ["Prox24TrainerCallback"]
