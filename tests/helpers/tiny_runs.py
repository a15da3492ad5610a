"""A small model, its data and a quiet trainer for the tests of the callbacks."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TinyModule(LightningModule):
    """Regression with a hidden layer; the optimizer is chosen by name."""

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.model = nn.Sequential(
            nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
            "adam": lambda p: torch.optim.Adam(p, lr=0.01),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
            "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        }[self.optimizer](self.parameters())


def tiny_loader(batches: int = 8, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * batch_size, 8, generator=generator)
    y = torch.tanh(x @ torch.randn(8, 4, generator=generator))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class StatefulLoader:
    """Batches that go on where they stopped; Lightning replays those of a plain loader from the first."""

    def __init__(self, batches):
        self.batches = list(batches)
        self.next = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def quiet_trainer(**arguments) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_steps": 20,
    }
    return Trainer(**{**defaults, **arguments})
