"""The Lightning callbacks: they decide when, the rooms below know how."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prox24_lightning.callbacks.convert_and_benchmark import ConvertAndBenchmark
    from prox24_lightning.callbacks.distillation import Distillation
    from prox24_lightning.callbacks.prox24 import Prox24
    from prox24_lightning.callbacks.round_weights import RoundWeights
    from prox24_lightning.callbacks.sparsity_monitor import SparsityMonitor

__all__ = ["ConvertAndBenchmark", "Distillation", "Prox24", "RoundWeights", "SparsityMonitor"]

_HOMES = {
    "ConvertAndBenchmark": "convert_and_benchmark",
    "Distillation": "distillation",
    "Prox24": "prox24",
    "RoundWeights": "round_weights",
    "SparsityMonitor": "sparsity_monitor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
