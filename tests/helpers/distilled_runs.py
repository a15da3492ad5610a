"""Modules and runs for the tests of distillation."""

from __future__ import annotations

import torch
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Distillation


class TinyClassifier(TinyModule):
    """The tiny module with its outputs read as logits of four classes."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y.argmax(-1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Residual(nn.Module):
    """Three blocks in a ModuleList; each returns a tuple, as those of many libraries do."""

    def __init__(self, depth=3, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


class ResidualClassifier(TinyClassifier):
    def __init__(self, model=None):
        super().__init__()
        self.model = Residual() if model is None else model


def fit(module, *callbacks, steps=3, batches=8, ckpt_path=None, **arguments):
    """Fit and return the trainer."""
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **arguments)
    trainer.fit(module, tiny_loader(batches=batches), ckpt_path=ckpt_path)
    return trainer


def distillation(share=0.5, **arguments):
    return Distillation(share, **{"verbose": False, **arguments})
