"""Weights beside those of the last step, from one run: averages along the frozen phase, and mixtures with its start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from prox24_lightning import Prox24

SHARES = (0.6, 0.8)
"""Of the last weights in a mixture with those at the freeze."""


class Averages(Callback):
    """Keeps the weights right after the freeze, and running averages from there; all have the masks of the freeze.

    Mixing weights before and after fine-tuning keeps more of what the model knew (arXiv 2109.01903).

    Args:
        decays: of the running averages, a step.
    """

    def __init__(self, decays: tuple[float, ...] = (0.98, 0.995)) -> None:
        self._start: list[Tensor] = []
        self._running: dict[float, list[Tensor]] = {decay: [] for decay in decays}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pruners = [callback for callback in trainer.callbacks if isinstance(callback, Prox24)]  # type: ignore[attr-defined]
        if any(pruner.phase != "frozen" for pruner in pruners):
            return
        values = [parameter.detach() for parameter in pl_module.parameters()]
        if not self._start:
            self._start = [value.clone() for value in values]
            self._running = {decay: [value.clone() for value in values] for decay in self._running}
        for decay, average in self._running.items():
            torch._foreach_lerp_(average, values, 1 - decay)

    @torch.no_grad()
    def put_in_turn(self, module: LightningModule) -> Iterator[str]:
        """Put each of them into ``module``, and yield what it is; the last weights come back at the end."""
        parameters = list(module.parameters())
        last = [parameter.detach().clone() for parameter in parameters]
        found = {f"average {decay}": average for decay, average in self._running.items()}
        for share in SHARES if self._start else ():
            mixed = [start.to(end).lerp(end, share) for start, end in zip(self._start, last, strict=True)]
            found[f"{share} of the last"] = mixed
        for name, values in found.items():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            yield name
        for parameter, value in zip(parameters, last, strict=True):
            parameter.copy_(value)
