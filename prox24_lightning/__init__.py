"""Lightning callbacks that take a PyTorch model to 2:4 sparsity while it trains.

Names are imported when first used: the tensor functions need torch only, the callbacks bring Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prox24_lightning.callbacks import (
        ConvertAndBenchmark,
        Distillation,
        Prox24,
        RoundWeights,
        SparsityMonitor,
    )
    from prox24_lightning.finetune import load_masks, save_masks
    from prox24_lightning.integrations.transformers import (
        DistillationTrainerCallback,
        Prox24TrainerCallback,
        RoundWeightsTrainerCallback,
        SparsityMonitorTrainerCallback,
    )
    from prox24_lightning.integrations.transformers.generation import accelerate_generation
    from prox24_lightning.integrations.transformers.registration import register_with_transformers
    from prox24_lightning.mask import is_24, mask_24, transposable_mask, violations_24
    from prox24_lightning.prox import critical_strength_24, penalty_24, prox_24, prox_block

__version__ = "0.1.0"
__all__ = [
    "ConvertAndBenchmark",
    "Distillation",
    "DistillationTrainerCallback",
    "Prox24",
    "Prox24TrainerCallback",
    "RoundWeights",
    "RoundWeightsTrainerCallback",
    "SparsityMonitor",
    "SparsityMonitorTrainerCallback",
    "accelerate_generation",
    "critical_strength_24",
    "is_24",
    "load_masks",
    "mask_24",
    "penalty_24",
    "prox_24",
    "prox_block",
    "register_with_transformers",
    "save_masks",
    "transposable_mask",
    "violations_24",
]

_HOMES = {
    "ConvertAndBenchmark": "callbacks",
    "Distillation": "callbacks",
    "DistillationTrainerCallback": "integrations.transformers",
    "Prox24": "callbacks",
    "Prox24TrainerCallback": "integrations.transformers",
    "RoundWeights": "callbacks",
    "RoundWeightsTrainerCallback": "integrations.transformers",
    "SparsityMonitor": "callbacks",
    "SparsityMonitorTrainerCallback": "integrations.transformers",
    "accelerate_generation": "integrations.transformers.generation",
    "critical_strength_24": "prox",
    "is_24": "mask",
    "load_masks": "finetune",
    "mask_24": "mask",
    "penalty_24": "prox",
    "prox_24": "prox",
    "prox_block": "prox",
    "register_with_transformers": "integrations.transformers.registration",
    "save_masks": "finetune",
    "transposable_mask": "mask",
    "violations_24": "mask",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
