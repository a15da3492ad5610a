"""What the progressive strategy asks of a way to calibrate: from which inputs, and how, blocks are solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.solvers.config import DAMPING, SolverConfig
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.sparsify.strategies.base import Masks, RunContext
from prox24_lightning.sparsify.strategies.progressive.blocks import Block

CalibrationMode = Literal["auto", "stream", "magnitude"]


@dataclass(frozen=True)
class SolveSettings:
    """How blocks are solved; see :class:`~prox24_lightning.sparsify.strategies.progressive.strategy.Progressive`."""

    batches: int
    dense_target: float
    reconstruction_steps: int
    gradient_weighting: bool
    prox_steps: int | None
    reorder_inputs: bool = False
    budget: float = 0.0
    layer_times: LayerTimes | None = None
    token_weighting: float = 0.0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} must be at least 1")
        if not 0 <= self.dense_target <= 1:
            raise ValueError(f"dense_target={self.dense_target} must lie in [0, 1]")
        if self.reconstruction_steps < 0:
            raise ValueError(f"reconstruction_steps={self.reconstruction_steps} must be 0 or more")
        if not 0 <= self.token_weighting <= 1:
            raise ValueError(f"token_weighting={self.token_weighting} must lie in [0, 1]")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping} must be above 0")
        if self.prox_steps is not None and self.prox_steps < 1:
            raise ValueError(f"prox_steps={self.prox_steps} must be at least 1")

    def solver(self, module: nn.Module) -> SolverConfig:
        """Return how the layer ``module`` is solved.

        The matrix of a convolution has kernel positions times channels as columns, and training waits for it: it goes
        the short path, if the number of steps is left to the solver.
        """
        if self.prox_steps is None and isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return SolverConfig(path="short", damping=self.damping)
        return SolverConfig(steps=self.prox_steps, damping=self.damping)


class Calibration(ABC):
    """Watches training batches, and solves blocks on what it has seen.

    Args:
        model: what holds the weights.
        settings: how blocks are solved.

    Attributes:
        blocks: what becomes 2:4, in this order.
    """

    def __init__(self, model: nn.Module, settings: SolveSettings) -> None:
        self.model = model
        self.settings = settings
        self.context = RunContext((), PhasePlan(0, 0), lambda name: None)
        self.blocks: list[Block] = []

    @abstractmethod
    def attach(self, context: RunContext, state: dict[str, Any]) -> None:
        """Begin, or go on from a state of :meth:`state_dict`, which is empty where there is none."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook, and free what is kept."""

    @abstractmethod
    def begin_batch(self, due: Collection[str], *, everything: bool) -> None:
        """A training batch begins.

        Args:
            due: names of the blocks whose pruning step is near, to be solved on this batch.
            everything: watch the whole model: the batch shows in which order it runs.
        """

    @abstractmethod
    def end_batch(self) -> None:
        """The training batch has ended."""

    def begin(self) -> str | None:
        """The sparsify phase begins; return why there is no dense reference, where there ought to be one.

        Raises:
            RerunError: if the model cannot be called again.
        """
        return None

    def after_step(self) -> None:  # noqa: B027
        """An optimizer step of the sparsify phase has been taken.

        Raises:
            RerunError: if the model cannot be called again.
        """

    @abstractmethod
    def solve(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Masks]]:
        """Solve blocks, write their values into the model, and yield the masks of each as it is done.

        Weights without a mask are left to their magnitude.

        Raises:
            RerunError: if the model cannot be called again; the block at work may be half solved.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors; of all ranks on the first."""
