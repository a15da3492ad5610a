"""``digits``: a small convolutional net on the handwritten digits that scikit-learn carries (1797 images, 8 x 8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from recipes.optim import adamw_with_cosine

CLASSES = 10


class DigitNet(LightningModule):
    """Two convolutions and two linear layers. The first convolution reads one channel, so it cannot be 2:4.

    Args:
        channels: channels of the first convolution; the second has twice as many. Divides by 4.
        hidden: width of the hidden linear layer. Divides by 4.
        lr: peak learning rate of AdamW.
        weight_decay: decay of weight matrices and kernels.
        warmup_steps: optimizer steps of linear warm-up.
    """

    def __init__(
        self,
        channels: int = 16,
        hidden: int = 64,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 4 * 4, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.model(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        return adamw_with_cosine(
            self,
            lr=self.hparams["lr"],
            weight_decay=self.hparams["weight_decay"],
            warmup_steps=self.hparams["warmup_steps"],
        )

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy.update(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", self.accuracy, prog_bar=True)


class Digits(LightningDataModule):
    """Images ``(batch, 1, 8, 8)`` with values in [0, 1], split once and for all, each class in proportion.

    Args:
        batch_size: images a batch.
        validation: fraction of the images held out for validation (and test).
        num_workers: processes that load batches; the images lie in memory, so 0 is fast.
    """

    def __init__(self, batch_size: int = 64, validation: float = 0.3, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16,
            torch.tensor(labels),
            test_size=self.hparams["validation"],
            random_state=0,
            stratify=labels,
        )
        self.training = TensorDataset(parts[0], parts[2])
        self.held_out = TensorDataset(parts[1], parts[3])

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.training, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.held_out)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.held_out)

    def _loader(self, images: TensorDataset, **options: Any) -> DataLoader:
        return DataLoader(
            images, batch_size=self.hparams["batch_size"], num_workers=self.hparams["num_workers"], **options
        )
