"""Settings that are valid, and hardly meant: what a new run warns of, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.sparsify.zeros import weights_24
from prox24_lightning.weights.selection import GroupedWeight


def traps(
    config: SparsifyConfig, plan: PhasePlan, total_steps: int | float, weights: Sequence[GroupedWeight]
) -> Iterator[str]:
    """Yield a text for each trap that a new run is about to walk into. All ranks call it.

    Args:
        config: of the run.
        plan: its phases.
        total_steps: its length; ``inf`` or negative if it is not known.
        weights: that become 2:4.
    """
    yield from _unused_settings(config)
    if config.strategy == "keep":
        return
    sparse = weights_24(weights)
    if sparse and plan.freeze > 0:
        yield (
            f"{len(sparse)} of the {len(weights)} weights are 2:4 already ({sparse[0].name} is one), and get new masks "
            f"{plan.when()}; strategy='keep' keeps the zeros that are there, and "
            "fine-tunes the rest"
        )
    few = config.calibration_batches
    solves = config.strategy == "progressive" and config.calibration != "magnitude"
    if solves and plan.freeze == 0 and len(sparse) < len(weights):
        yield (
            "freeze=0 prunes before the first batch: there are no layer inputs to solve the layers on, and the largest "
            f"weights are kept; start={few}, freeze={few} prunes in one shot on the first {few} batches "
            "(calibration='magnitude' if this is meant)"
        )
    if isinstance(config.freeze, int) and config.freeze == 1 and config.start == 0 and not 0 <= total_steps <= 1:
        yield (
            "freeze=1 is an int, and so the first optimizer step; freeze=1.0 would be the end of the run, freeze=0.3 "
            "less than a third of it (start=1, freeze=1 if the first step is meant)"
        )
    if isinstance(config.freeze, float) and config.freeze == 1 and plan.freeze > 1:
        yield (
            f"freeze=1.0 is the end of the run, step {plan.freeze}: nothing trains under the masks, and the loss does "
            f"not recover; take a smaller fraction, as 0.3 (freeze={plan.freeze} if this is meant)"
        )


def without_effect(config: SparsifyConfig) -> list[str]:
    """Return the names of settings that are not at their defaults and that nothing reads, whatever the strategy."""
    solves = config.strategy == "progressive" and config.calibration != "magnitude"
    reruns = solves and config.calibration == "auto"
    read = {
        "dense_target": reruns,
        "reconstruction_steps": reruns,
        "gradient_weighting": reruns and config.reconstruction_steps > 0,
        "reorder_inputs": reruns,
        "budget": reruns,
        "token_weighting": reruns,
        "damping": solves,
        "calibration_batches": solves,
        "calibration": config.strategy == "progressive",
        "metric": config.strategy != "keep",
        "fraction": config.strategy == "post_step" and config.schedule == "auto",
    }
    return [name for name, is_read in read.items() if not is_read and _is_set(config, name)]


def _unused_settings(config: SparsifyConfig) -> Iterator[str]:
    if unused := without_effect(config):
        deciding = [name for name in ("calibration", "reconstruction_steps", "schedule") if _is_set(config, name)]
        where = [name for name in ("strategy", *deciding) if name not in unused]
        yield f"what is set has no effect with {_given(config, where)}: {_given(config, unused)}; leave it out"


def _is_set(config: SparsifyConfig, name: str) -> bool:
    return bool(getattr(config, name) != SparsifyConfig.__dataclass_fields__[name].default)


def _given(config: SparsifyConfig, names: Sequence[str]) -> str:
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
