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
    if config.strategy == "keep":
        return
    sparse = weights_24(weights)
    if sparse and plan.freeze > 0:
        yield (
            f"{len(sparse)} of the {len(weights)} weights are 2:4 already ({sparse[0].name} is one), and get new masks "
            f"from step {plan.start} to step {plan.freeze}; strategy='keep' keeps the zeros that are there, and "
            "fine-tunes the rest"
        )
    yield from _without_effect(config)
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


def _without_effect(config: SparsifyConfig) -> Iterator[str]:
    if config.strategy != "progressive":
        unused = [name for name in ("token_weighting", "calibration_batches") if _is_set(config, name)]
        why = f"strategy={config.strategy!r}: they belong to strategy='progressive'"
    elif config.calibration != "auto":
        unused = [name for name in ("token_weighting",) if _is_set(config, name)]
        why = f"calibration={config.calibration!r}: it belongs to calibration='auto'"
    else:
        return
    if unused:
        given = ", ".join(f"{name}={getattr(config, name)}" for name in unused)
        yield f"the setting has no effect: {given} with {why}; leave it out"


def _is_set(config: SparsifyConfig, name: str) -> bool:
    return bool(getattr(config, name) != SparsifyConfig.__dataclass_fields__[name].default)
