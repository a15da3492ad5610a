"""One-shot pruning before the first step; Prox24 enforces the masks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from prox24_lightning.oneshot import prune_layerwise


class OneShot(Callback):
    """Prunes ``pl_module.<child>`` layer by layer on the device where it will train, at the start of the fit.

    Follow it with ``Prox24(start=0, freeze=0)``, whose masks then are the zeros made here. A callback that wants the
    dense model (Distillation) copies it earlier.

    Args:
        batches: calibration batches, as the child takes them.
        child: name of the module that is pruned.
        settings: ``method``, ``refine`` and more of :func:`~prox24_lightning.oneshot.prune_layerwise`.
    """

    def __init__(self, batches: Sequence[Any], *, child: str = "model", **settings: Any) -> None:
        super().__init__()
        self.batches = batches
        self.child = child
        self.settings = settings
        self.seconds = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: nn.Module = pl_module.get_submodule(self.child)
        begin = time.perf_counter()
        # Layers are taken one by one with hooks that come and go: a compiled block would be compiled for each.
        with torch.compiler.set_stance("force_eager"):
            prune_layerwise(model, self.batches, progress=False, **self.settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begin
