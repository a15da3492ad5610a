"""SR-STE (Zhou et al., "Learning N:M fine-grained structured sparse networks from scratch", arXiv 2102.04010)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.peers.flat_groups import FlatGroups
from benchmarks.peers.peer import Peer
from prox24_lightning.mask import mask_24


class SRSTE(Peer):
    """Forward and backward with the weights under the magnitude mask, the update on the dense weights.

    The gradient passes the mask unchanged (straight-through estimator), plus ``decay * pruned weights`` (the sparse
    refinement): ``w <- w - lr * (grad(w * m) + decay * (1 - m) * w)``, the mask found anew for every batch. While a
    batch or a validation runs, the parameters hold the masked weights; at the end they keep them.

    Args:
        decay: the paper's lambda_W.
    """

    def __init__(self, decay: float = 2e-4) -> None:
        super().__init__()
        self.decay = decay
        self._dense: list[Tensor] = []
        self._pruned: list[Tensor] = []
        self._scoring = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._dense:  # with accumulated gradients, the batches of one step share its mask
            self._mask()

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [weight.parameter.grad for weight in self.weights]
        seen = [index for index, gradient in enumerate(gradients) if gradient is not None]
        pruned = [self._pruned[index] for index in seen]
        self._restore()
        torch._foreach_add_([gradients[index] for index in seen], pruned, alpha=self.decay)

    def after_step(self) -> None:
        """The dense weights were updated; the next batch masks them."""

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scoring = bool(self.weights) and not self._dense
        if self._scoring:
            self._mask()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scoring:
            self._restore()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask()
        self._dense, self._pruned = [], []

    @torch.no_grad()
    def _mask(self) -> None:
        parameters = [weight.parameter.detach() for weight in self.weights]
        flat = FlatGroups(self.weights)
        dense = flat.gather(parameters)
        kept = dense * mask_24(dense)
        self._dense = flat.scatter(dense)
        self._pruned = flat.scatter(dense - kept)
        torch._foreach_copy_(parameters, flat.scatter(kept))

    @torch.no_grad()
    def _restore(self) -> None:
        if self._dense:
            torch._foreach_copy_([weight.parameter.detach() for weight in self.weights], self._dense)
        self._dense, self._pruned = [], []
