"""Hugging Face transformers: pruning in a ``Trainer``, packed folders in ``from_pretrained``, fast ``generate``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prox24_lightning.integrations.transformers.distillation_callback import DistillationTrainerCallback
    from prox24_lightning.integrations.transformers.generation import accelerate_generation
    from prox24_lightning.integrations.transformers.monitor_callback import SparsityMonitorTrainerCallback
    from prox24_lightning.integrations.transformers.registration import register_with_transformers
    from prox24_lightning.integrations.transformers.round_weights_callback import RoundWeightsTrainerCallback
    from prox24_lightning.integrations.transformers.trainer_callback import Prox24TrainerCallback

__all__ = [
    "DistillationTrainerCallback",
    "Prox24TrainerCallback",
    "RoundWeightsTrainerCallback",
    "SparsityMonitorTrainerCallback",
    "accelerate_generation",
    "register_with_transformers",
]

_HOMES = {
    "DistillationTrainerCallback": "distillation_callback",
    "Prox24TrainerCallback": "trainer_callback",
    "RoundWeightsTrainerCallback": "round_weights_callback",
    "SparsityMonitorTrainerCallback": "monitor_callback",
    "accelerate_generation": "generation",
    "register_with_transformers": "registration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
