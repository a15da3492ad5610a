"""Zeros that a model has before a run: which weights are 2:4 already, and whether they stay so."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prox24_lightning.finetune.lora import unmasked_adapters
from prox24_lightning.mask import is_24
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.weights.selection import GroupedWeight, Selection, SkippedWeight, select_weights
from prox24_lightning.weights.sharded import local_part

NOT_24 = "not 2:4 in the model that was given"
"""The reason for which ``strategy="keep"`` leaves a weight dense."""


def weights_24(weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
    """Return those of ``weights`` that are 2:4, and not all zero. All ranks call it."""
    parts = [local_part(weight.parameter).detach() for weight in weights]
    mine = [(is_24(part, dim=w.dim), bool((part != 0).any())) for w, part in zip(weights, parts, strict=True)]
    ranks = list(zip(*gathered_objects(mine), strict=True))
    return [
        weight
        for weight, found in zip(weights, ranks, strict=True)
        if all(sparse for sparse, _ in found) and any(alive for _, alive in found)
    ]


def only_24(selection: Selection, *, explicit: bool) -> Selection:
    """Leave out the weights that are not 2:4. All ranks call it.

    Args:
        explicit: the user has named the weights.

    Raises:
        ValueError: if a named weight is not 2:4, or none is.
    """
    kept = weights_24(selection.chosen)
    dense = [weight for weight in selection.chosen if weight not in kept]
    if dense and (explicit or not kept):
        raise ValueError(
            f"strategy='keep' takes the zeros that the model has, but {_are([weight.name for weight in dense])} not "
            "2:4; load the pruned weights before the run, or leave strategy out to prune in it"
        )
    left = [SkippedWeight(w.name, type(w.module).__name__, tuple(w.parameter.shape), NOT_24) for w in dense]
    return Selection(tuple(kept), (*selection.skipped, *left))


class ZerosWatch:
    """Notice that a model which was 2:4 when training began is so no more: nothing enforces its masks.

    Args:
        model: as training begins; all ranks make the watch.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            self._weights = weights_24(select_weights(model).chosen)
        except ValueError:  # lazy or meta parameters
            self._weights = []
        self._adapters = unmasked_adapters(model)

    def problem(self) -> str | None:
        """Return what has become of the zeros, at the first call, which all ranks make after an optimizer step."""
        weights, self._weights = self._weights, []
        adapters, self._adapters = self._adapters, []
        kept = {weight.name for weight in weights_24(weights)}
        lost = [weight.name for weight in weights if weight.name not in kept]
        if lost:
            return (
                f"{_are(lost)} no longer 2:4, as when training began: nothing enforces the masks, and the model ends "
                "dense; add Prox24(strategy='keep') to the callbacks, or call load_masks"
            )
        if adapters:
            return (
                f"{_are(adapters)} 2:4 under LoRA adapters that are not masked, and dense once peft merges them; train "
                "with prox24_lightning.finetune.MaskedLora(model), and merge with its merge()"
            )
        return None


def _are(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
