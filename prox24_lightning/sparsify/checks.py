"""Checks that optimizers, weights and saved states fit together, before the first batch and during the run.

Errors carry the name and the remedy: ``ValueError`` for what the user has set, ``RuntimeError`` for what has happened
since.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from prox24_lightning.finetune.optimizers import check_optimizer, masters_of
from prox24_lightning.utils.distributed import any_rank, rank
from prox24_lightning.utils.files import check_folder
from prox24_lightning.weights.groups import Dim
from prox24_lightning.weights.selection import GroupedWeight, Selection, SkippedWeight
from prox24_lightning.weights.sharded import cut_groups, local_part

NOT_OPTIMIZED = "in no optimizer"
"""The reason for which a weight stays dense."""


def check_place(masks_file: str | Path | None) -> None:
    """Refuse a file that could not be written at the end of the run."""
    if masks_file is None:
        return
    path = Path(masks_file)
    if path.is_dir():
        raise ValueError(f"masks_file={str(masks_file)!r} is a folder; name a file in it")
    try:
        check_folder(path.parent)
    except OSError as error:
        raise ValueError(f"masks_file={str(masks_file)!r} cannot be written: {error}") from error


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose steps cannot be observed, or that a prox between steps would mislead."""
    for optimizer in optimizers:
        check_optimizer(optimizer)


def optimized(selection: Selection, optimizers: Sequence[Optimizer], *, explicit: bool) -> Selection:
    """Leave out what no optimizer holds; refuse what several hold."""
    holders: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    masters = masters_of(optimizers, [weight.parameter for weight in selection])
    chosen, skipped = [], list(selection.skipped)
    for weight in selection.chosen:
        count = holders.get(id(masters.get(weight.parameter, weight.parameter)), 0)
        if count > 1:
            raise ValueError(
                f"{weight.name} is held by {count} optimizers, so the prox would follow neither; "
                f"give it to one of them, or add it to skip"
            )
        if count == 1:
            chosen.append(weight)
            continue
        if explicit:
            raise ValueError(f"target {weight.name} is in no optimizer; give it to one, or add it to skip")
        shape = tuple(weight.parameter.shape)
        skipped.append(SkippedWeight(weight.name, type(weight.module).__name__, shape, NOT_OPTIMIZED))
    return Selection(tuple(chosen), tuple(skipped))


def check_weights(selection: Selection, claimed: Mapping[str, Selection], name: str, *, moved: bool = True) -> None:
    """Refuse a selection that is empty, sharded through groups, or shares a weight with another instance.

    Args:
        selection: of this instance.
        claimed: the selections of the other instances, by their names.
        name: of this instance.
        moved: whether the weights are moved by the prox, which 16 bits are too few for.
    """
    if not selection.chosen:
        reasons = "; ".join(f"{weight.name}: {weight.reason}" for weight in selection.skipped[:8])
        raise ValueError(
            f"found no weight that can be 2:4 ({reasons or 'the model has no weight matrix'}); "
            "change targets or skip, or use layer sizes that divide by 4"
        )
    for weight in selection:
        if cut := cut_groups(weight.parameter, weight.dim):
            raise ValueError(
                f"{weight.name} cannot be 2:4: {cut}; shard its other dimension, use fewer ranks, or add it to skip"
            )
    mine = {id(weight.parameter) for weight in selection}
    for other, theirs in claimed.items():
        both = [weight.name for weight in theirs if id(weight.parameter) in mine]
        if both:
            raise ValueError(f"name={name!r} and name={other!r} both take {both[0]}; separate them by targets and skip")
    if (dense := selection.warning()) is not None and rank() == 0:
        warnings.warn(dense, stacklevel=2)
    low = sorted({str(weight.parameter.dtype) for weight in selection if weight.parameter.element_size() < 4})
    if low and moved and rank() == 0:
        warnings.warn(
            f"the weights are stored in {low[0]}: steps of the prox smaller than half a unit in the last place are "
            "lost; train in mixed precision (bf16-mixed) to keep float32 weights",
            stacklevel=2,
        )


def check_followed(gone: Sequence[GroupedWeight], selection: Selection) -> None:
    """Refuse layers that have been exchanged for others which would be pruned, if an optimizer trained them.

    Args:
        gone: weights that are in the model no more, or cannot be 2:4 any more.
        selection: of the model as it is now.
    """
    untrained = {weight.name for weight in selection.skipped if weight.reason == NOT_OPTIMIZED}
    for weight in gone:
        if weight.name in untrained:
            raise RuntimeError(
                f"{weight.name} has been replaced, its whole layer by another one, since training began, and the "
                "optimizers have not followed: they would train what the model no longer uses; replace it in the "
                "optimizer's param_groups as well, or change the model before fit"
            )


def check_same_weights(saved: Mapping[str, Dim], mine: Mapping[str, Dim]) -> None:
    """Refuse masks of other weights; both map names to the dimension (or dimensions) of the groups."""
    if saved == mine:
        return
    lost, new = sorted(set(saved) - set(mine)), sorted(set(mine) - set(saved))
    turned = [name for name in saved if name in mine and saved[name] != mine[name]]
    raise ValueError(
        f"the checkpoint's masks belong to other weights: only in the checkpoint: {lost or 'none'}; only in the "
        f"model: {new or 'none'}; grouped along another dimension: {turned or 'none'}; use the targets, skip and "
        "geometry that the checkpoint was written with"
    )


def has_replaced(
    weights: Sequence[GroupedWeight], before: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]
) -> bool:
    """Return whether parameters were replaced by others that the optimizers train.

    Raises:
        RuntimeError: if they have not, or two weights are now one.
    """
    replaced = [weight for weight in weights if weight.parameter is not before.get(weight.name, weight.parameter)]
    if not replaced:
        return False
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for weight in replaced:
        old, new = id(before[weight.name]), id(weight.parameter)
        if new not in trained or old in trained or sum(id(other.parameter) == new for other in weights) > 1:
            raise RuntimeError(
                f"{weight.name} has been replaced by another parameter (or tied to another weight) since training "
                "began, and the optimizers have not followed: they would train what the model no longer uses; "
                "replace it in the optimizer's param_groups as well, or change the model before fit"
            )
    return True


def check_finite(weights: Sequence[GroupedWeight], step: int) -> None:
    """Refuse to save weights that are lost: they must not replace the last good ones on the disk. All ranks call it."""
    finite = [torch.isfinite(local_part(weight.parameter)).all() for weight in weights]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite])
    if any_rank(not bool(flags.all()), flags.device):
        lost = [weight.name for weight, flag in zip(weights, flags.tolist(), strict=True) if not flag]
        first = lost[0] if lost else "one on another rank"
        raise RuntimeError(
            f"weights are NaN or infinite after step {step} (the first is {first}): nothing is saved, so the last "
            "checkpoint before it stays; resume from there with a lower learning rate, clipped gradients, or without "
            "the batch that did it"
        )
