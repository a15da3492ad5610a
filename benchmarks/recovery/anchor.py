"""Decay towards the weights with which recovery began, instead of towards zero."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from prox24_lightning import Prox24


class Anchor(Callback):
    """Pulls every weight towards its value at the freeze (L2-SP, arXiv 1802.01483); what is pruned stays zero.

    Each step takes ``rate * strength`` of the way, with the learning rate of the weight's group, as AdamW decays.

    Args:
        strength: in the place of ``weight_decay``.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._starts: list[list[Tensor]] = []

    @override
    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        pruners = [callback for callback in trainer.callbacks if isinstance(callback, Prox24)]  # type: ignore[attr-defined]
        if any(pruner.phase != "frozen" for pruner in pruners):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not self._starts:
            self._starts = [[parameter.detach().clone() for parameter in group["params"]] for group in groups]
        for group, start in zip(groups, self._starts, strict=True):
            torch._foreach_lerp_(group["params"], start, group["lr"] * self.strength)
