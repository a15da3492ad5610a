"""What is trained: a module, its data and how its scores are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule

from benchmarks.recovery.rows import Row


class Task(ABC):
    """One training problem; everything that all rows share."""

    steps: int
    plain: tuple[str, ...]
    """Rows whose fit is the unit of wall time: plain masked fine-tuning, all the same once the mask is found."""

    split: Literal["val", "test"]
    """Which held-out part is reported."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All settings that change a result, as plain types."""

    @abstractmethod
    def module(self, lr: float | None, more: Mapping[str, Any] | None = None) -> LightningModule:
        """A fresh module; ``lr`` None is the task's own, and ``more`` are further arguments of it."""

    @abstractmethod
    def data(self, seed: int) -> LightningDataModule:
        """The data of a seed."""

    @abstractmethod
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer beyond those of the protocol."""

    @abstractmethod
    def losses(self, scores: dict[str, float]) -> dict[str, float]:
        """Loss by text, of what was logged for the reported part."""

    def check_texts(self) -> str | None:
        """Return a line with the measured overlap of held-out and training text; None for a task without text.

        Raises:
            ValueError: if they share a window of words.
        """
        return None

    def search_loss(self, scores: dict[str, float]) -> float:
        """The loss that learning rates are chosen by."""
        raise ValueError(f"{type(self).__name__} holds no text apart for choosing learning rates; leave lrs out")

    def calibration(self, data: LightningDataModule) -> list[Any]:
        """Batches for pruning before the first step."""
        raise ValueError(f"{type(self).__name__} has no calibration batches; leave out the rows that prune at once")

    def finished(self, module: LightningModule) -> None:
        """Do what is to be done with a trained and scored module; nothing here."""
        return

    def adapted(self, row: Row) -> Row:
        """The row with what the task itself sets."""
        return row
