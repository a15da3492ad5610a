"""What the peers have in common: the weights they take, and a call after every real optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from prox24_lightning.finetune import MaskedParameters
from prox24_lightning.sparsify.phases import PhasePlan, resolve_plan
from prox24_lightning.sparsify.step_listener import StepListener
from prox24_lightning.weights.selection import GroupedWeight, select_weights


class Peer(Callback):
    """Takes the weights that ``Prox24()`` would take.

    Args:
        start, freeze: as in Prox24: steps, or fractions of the run.
    """

    def __init__(self, start: int | float = 0, freeze: int | float = 0) -> None:
        super().__init__()
        self.start = start
        self.freeze = freeze
        self.step = 0
        self.plan = PhasePlan(0, 0)
        self.weights: tuple[GroupedWeight, ...] = ()
        self.masked = MaskedParameters()
        self.optimizers: tuple[Optimizer, ...] = ()
        self._listener = StepListener(self._stepped)

    @abstractmethod
    def after_step(self) -> None:
        """Called after each real optimizer step; ``self.step`` counts it already."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = select_weights(pl_module).chosen
        if not self.weights:
            raise ValueError(f"{type(pl_module).__name__} has no weight that could be 2:4")
        self.plan = resolve_plan(self.start, self.freeze, trainer.estimated_stepping_batches)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizers = tuple(trainer.optimizers)
        self._listener.bind(self.optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._listener.before_batch(weight.parameter for weight in self.weights)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _stepped(self, optimizer: Optimizer) -> None:
        self.step += 1
        self.masked.mask_weights()
        self.after_step()

    def _release(self) -> None:
        self._listener.unbind()
        self.masked.release_all()
        self.optimizers = ()
