"""Do the model, the trainer and :class:`~prox24_lightning.Prox24` fit together? Asked before the first batch.

Each function returns if they do, and otherwise raises ``MisconfigurationException`` with the name and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from prox24_lightning.groups import Selection, SkippedWeight
from prox24_lightning.sharding import cut_groups

_REFUSED_STRATEGIES = {
    "FSDPStrategy": "FSDP1 flattens parameters and cuts groups of four apart; "
    "use ModelParallelStrategy (FSDP2) or DDPStrategy",
    "DeepSpeedStrategy": "DeepSpeed keeps the weights that count inside its own optimizer; use DDPStrategy",
    "XLAStrategy": "XLA steps its optimizers outside of Python's reach; use a CPU or CUDA accelerator",
    "XLAFSDPStrategy": "XLA steps its optimizers outside of Python's reach; use a CPU or CUDA accelerator",
}
_CLASHING_CALLBACKS = ("ModelPruning",)


def check_trainer(trainer: Trainer) -> None:
    """Refuse parallel strategies that hide or cut parameters, and callbacks that prune as well."""
    for cls in type(trainer.strategy).__mro__:
        if cls.__name__ in _REFUSED_STRATEGIES:
            raise MisconfigurationException(
                f"Prox24 cannot work with strategy={cls.__name__}: {_REFUSED_STRATEGIES[cls.__name__]}"
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(cls.__name__ in _CLASHING_CALLBACKS for cls in type(callback).__mro__):
            raise MisconfigurationException(
                f"Prox24 and {type(callback).__name__} would both prune the model; remove one of the two callbacks"
            )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose steps cannot be noticed, or that a prox between steps would mislead."""
    for optimizer in optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise MisconfigurationException(
                f"Prox24 needs the step hooks of torch.optim.Optimizer, which {type(optimizer).__name__} lacks; "
                "derive it from torch.optim.Optimizer"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "Prox24 cannot work with LBFGS: the prox changes weights between steps and makes its curvature "
                "history false; use SGD, Adam or AdamW"
            )


def optimized(selection: Selection, optimizers: Sequence[Optimizer], *, explicit: bool) -> Selection:
    """Leave out what no optimizer holds; refuse what several hold."""
    holders: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    chosen, skipped = [], list(selection.skipped)
    for weight in selection.chosen:
        count = holders.get(id(weight.parameter), 0)
        if count > 1:
            raise MisconfigurationException(
                f"{weight.name} is held by {count} optimizers, so the prox would follow neither; "
                f"give it to one of them, or add it to skip"
            )
        if count == 1:
            chosen.append(weight)
            continue
        if explicit:
            raise MisconfigurationException(
                f"target {weight.name} is in no optimizer; add it to configure_optimizers, or to skip"
            )
        shape = tuple(weight.parameter.shape)
        skipped.append(SkippedWeight(weight.name, type(weight.module).__name__, shape, "in no optimizer"))
    return Selection(tuple(chosen), tuple(skipped))


def check_weights(selection: Selection, claimed: Mapping[str, Selection], name: str) -> None:
    """Refuse a selection that is empty, sharded through groups, or shares a weight with another instance.

    ``claimed`` are the selections of the other instances, by their names.
    """
    if not selection.chosen:
        reasons = "; ".join(f"{weight.name}: {weight.reason}" for weight in selection.skipped[:8])
        raise MisconfigurationException(
            f"Prox24 found no weight that can be 2:4 ({reasons or 'the model has no weight matrix'}); "
            "change targets or skip, or use layer sizes that divide by 4"
        )
    for weight in selection:
        if cut := cut_groups(weight.parameter, weight.dim):
            raise MisconfigurationException(
                f"{weight.name} cannot be 2:4: {cut}; shard its other dimension, use fewer ranks, or add it to skip"
            )
    mine = {id(weight.parameter) for weight in selection}
    for other, theirs in claimed.items():
        both = [weight.name for weight in theirs if id(weight.parameter) in mine]
        if both:
            raise MisconfigurationException(
                f"Prox24(name={name!r}) and Prox24(name={other!r}) both take {both[0]}; "
                "separate them by targets and skip"
            )
    low = sorted({str(weight.parameter.dtype) for weight in selection if weight.parameter.element_size() < 4})
    if low:
        rank_zero_warn(
            f"the weights are stored in {low[0]}: steps of the prox smaller than half a unit in the last place are "
            "lost; use precision='bf16-mixed' to keep float32 weights"
        )
