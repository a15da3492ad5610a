"""ProxSparse (Liu et al., "Regularized learning of semi-structured sparsity masks", arXiv 2502.00258)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from benchmarks.peers.flat_groups import FlatGroups
from benchmarks.peers.peer import Peer
from prox24_lightning.mask import mask_24
from prox24_lightning.prox import prox_24


class ProxSparse(Peer):
    """Mask learning, then masked fine-tuning of the original weights.

    Until ``freeze`` the prox of constant strength follows every optimizer step. Then the mask keeps the two largest
    of each group of what this led to, and the weights of before the run come back under it. The paper stops there;
    here the rest of the run trains them on, as with every other peer.

    Args:
        freeze: last step of mask learning: a step, or a fraction of the run.
        strength: as the authors' scripts set it (0.2 to 0.25 at a learning rate of 1e-4, for 400 steps), in 1/weight.
    """

    def __init__(self, freeze: int | float = 0.5, strength: float = 0.25) -> None:
        super().__init__(0, freeze)
        self.strength = strength
        self._original: list[Tensor] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._original = [weight.parameter.detach().clone() for weight in self.weights]

    @override
    @torch.no_grad()
    def after_step(self) -> None:
        if self.step > self.plan.freeze:
            return
        flat = FlatGroups(self.weights)
        parameters = [weight.parameter.detach() for weight in self.weights]
        torch._foreach_copy_(parameters, flat.scatter(prox_24(flat.gather(parameters), self.strength)))
        if self.step == self.plan.freeze:
            for weight, original in zip(self.weights, self._original, strict=True):
                mask = mask_24(weight.parameter, dim=weight.dim)
                weight.parameter.copy_(original)
                self.masked.apply(weight.name, weight.parameter, mask)
            self.masked.mask_optimizer_state(self.optimizers)
            self._original = []
