"""The training time of a run, and a checksum of its training data."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from prox24_lightning.utils.checksum import checksum


class TrainingRecord(Callback):
    """Record two facts about a fit.

    ``seconds`` lasts from the first training batch to the end of training, validation inside it included, loading
    of data and sanity checks before it left out. ``checksum`` is a SHA-256 over every tensor of every
    ``every_n_batches``-th training batch, in order (a batch is copied to the CPU for it, hence not every one).
    """

    def __init__(self, every_n_batches: int = 10) -> None:
        self.every_n_batches = every_n_batches
        self.seconds = 0.0
        self.checksum = ""
        self._started = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._started

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every_n_batches:
            return
        self.checksum = checksum([self.checksum, *map(_part, _tensors(batch))])


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch of any make that Lightning moves to a device, in order."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # not a dict: what a tokenizer of Hugging Face returns
            yield from _tensors(dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in fields(leaf)])


def _part(tensor: Tensor) -> Tensor | bytes:
    if tensor.layout == torch.strided and not tensor.is_nested:
        return tensor
    file = io.BytesIO()
    torch.save(tensor.detach().cpu(), file)  # sparse and nested tensors: whatever parts they have
    return file.getvalue()
