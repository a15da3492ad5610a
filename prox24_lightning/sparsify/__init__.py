"""From dense to frozen 2:4 along a training run, free of any training framework."""

from prox24_lightning.sparsify.engine import Metric, SparsityEngine
from prox24_lightning.sparsify.phases import Phase, PhasePlan, check_step, resolve_plan
from prox24_lightning.sparsify.strategies.base import Strategy
from prox24_lightning.sparsify.strategies.keep_zeros import KeepZeros
from prox24_lightning.sparsify.strategies.post_step.strategy import PostStepProx, Refit
from prox24_lightning.sparsify.strategies.post_step.strength import strength_for_fraction
from prox24_lightning.sparsify.strategies.progressive.strategy import Progressive

__all__ = [
    "KeepZeros",
    "Metric",
    "Phase",
    "PhasePlan",
    "PostStepProx",
    "Progressive",
    "Refit",
    "SparsityEngine",
    "Strategy",
    "check_step",
    "resolve_plan",
    "strength_for_fraction",
]
