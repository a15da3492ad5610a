"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878), for 2:4."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.peers.peer import Peer
from prox24_lightning.mask import mask_24
from prox24_lightning.schedules import Cubic
from prox24_lightning.weights.groups import from_groups, to_groups


class GradualMagnitude(Peer):
    """The share of 2:4 groups grows by the paper's cubic from ``start`` to ``freeze``, the same in every layer.

    Every ``every`` steps the groups that lose least (the sum of squares of their two smallest weights) become 2:4;
    pruned weights are masked from then on and never come back.

    Args:
        start, freeze: steps, or fractions of the run.
        every: optimizer steps between two prunings.
    """

    def __init__(self, start: int | float = 0.0, freeze: int | float = 0.5, every: int = 5) -> None:
        super().__init__(start, freeze)
        self.every = every
        self.curve = Cubic()

    @override
    def after_step(self) -> None:
        done, whole = self.step - self.plan.start, max(1, self.plan.freeze - self.plan.start)
        if done <= 0 or self.step > self.plan.freeze or (done % self.every and self.step != self.plan.freeze):
            return
        share = self.curve(done / whole)
        for weight in self.weights:
            mask = partial_mask(weight.parameter.detach(), share, dim=weight.dim)
            self.masked.apply(weight.name, weight.parameter, mask)
        self.masked.mask_optimizer_state(self.optimizers)


def partial_mask(weight: Tensor, share: float, *, dim: int = -1) -> Tensor:
    """Bool mask that makes ``share`` of the groups 2:4, those first that lose least of their squared weights.

    A group that is 2:4 already loses nothing, so it is among them.
    """
    keep = to_groups(mask_24(weight, dim=dim), dim)
    lost = to_groups(weight, dim).square().masked_fill(keep, 0.0).sum(-1)
    count = round(share * lost.numel())
    chosen = torch.zeros(lost.numel(), dtype=torch.bool, device=weight.device)
    chosen[lost.flatten().argsort(stable=True)[:count]] = True
    return from_groups(keep | ~chosen.view(lost.shape).unsqueeze(-1), dim)
