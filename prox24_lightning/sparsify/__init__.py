"""From dense to frozen 2:4 along a training run, free of any training framework."""

from prox24_lightning.sparsify.engine import Metric, Refit, SparsityEngine
from prox24_lightning.sparsify.phases import Phase, PhasePlan, check_step, resolve_plan
from prox24_lightning.sparsify.post_step import PostStepProx
from prox24_lightning.sparsify.strength import strength_for_fraction

__all__ = [
    "Metric",
    "Phase",
    "PhasePlan",
    "PostStepProx",
    "Refit",
    "SparsityEngine",
    "check_step",
    "resolve_plan",
    "strength_for_fraction",
]
