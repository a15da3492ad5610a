"""The mean training loss between two measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss that a training step returned: a tensor of one value, or a mapping with ``"loss"``; else None."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


class TrainingLoss:
    """Sum up the losses of the batches on their device, so that only :meth:`take` waits for it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._batches = 0

    def add(self, outputs: Any, factor: float = 1.0) -> None:
        """Add ``factor`` times the loss of a batch: a tensor, or a mapping with ``"loss"``; others are left out."""
        if (loss := loss_of(outputs)) is not None:
            value = factor * loss.detach().reshape(()).to(torch.float32)
            self._sum = value if self._sum is None else self._sum + value.to(self._sum.device)
            self._batches += 1

    def take(self) -> float:
        """Return the mean since the last call, and begin anew; NaN if there was no loss."""
        mean = math.nan if self._sum is None else float(self._sum) / self._batches
        self._sum, self._batches = None, 0
        return mean
