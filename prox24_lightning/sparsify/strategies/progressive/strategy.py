"""The progressive strategy: block after block goes 2:4 by the local squared loss, while the rest trains on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.solvers.config import DAMPING
from prox24_lightning.sparsify.solve_watch import SolveWatch
from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, RunContext, Strategy, projected_mask
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.calibration import Calibration, CalibrationMode, SolveSettings
from prox24_lightning.sparsify.strategies.progressive.errors import RerunError
from prox24_lightning.sparsify.strategies.progressive.rerun_calibration import RerunCalibration
from prox24_lightning.sparsify.strategies.progressive.stream_calibration import StreamCalibration
from prox24_lightning.sparsify.strategies.progressive.undo import undone_on_error
from prox24_lightning.utils.distributed import gathered_objects, rank
from prox24_lightning.weights.layer_matrix import why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 8
"""Batches on which a block is solved: the last ones of the training itself."""
_APART = 8
"""Steps between two pruning steps, at least, unless blocks are solved on fewer batches."""
RECONSTRUCTION_STEPS = 96
"""Gradient steps on a block whose layers have been solved."""
_PATIENCE = 16
"""So many batches may pass before every hooked module has been called; then the others decide."""

_Way = Literal["undecided", "rerun", "stream", "magnitude"]


class Progressive(Strategy):
    """One block after the other, in the order in which the model runs them, spread evenly over the sparsify phase.

    Pruning steps are at least 8 steps apart (or ``batches``, if that is fewer); where the phase is short several blocks
    share one. A block's layers are solved one after the other on what they see then, by the paper's layer-wise prox and
    masked gradient (arXiv 2501.18015, section 3), and frozen; everything that comes after trains on against the sparse
    block. A model without a list of like blocks goes layer after layer.

    Where the inputs come from is decided in the first batches, the same on all ranks, and named in one warning where it
    is not the first:

    1. *rerun*: the last training batches run once more through the model as it is now, up to the block. That happens
       apart from training: arguments are copied when the call is made, buffers, attributes, modes and random state are
       put back, dropout is off. The model must first compute again what training has just computed.
    2. *stream*: forward hooks sum up each layer's Hessian in the training batches before its pruning step, one input
       group after the other. Nothing is run twice; there is no dense reference and no reconstruction.
    3. *magnitude*, in the activation metric where that is known: for a layer whose inputs no hook sees, or that the
       solver cannot take (a packed attention projection, a grouped convolution).

    In a distributed run every rank runs its own batches, the Hessians are summed over the ranks, and every rank solves
    the whole layer, gathered if it is sharded. An error or an interrupt while blocks are solved gives all of them the
    values back that they had.

    Memory: the arguments of the last batches' calls, hidden states of one block on them, the Hessian of one layer,
    float32 (in_features, in_features) (streamed: of each layer whose pruning step is near), and with ``dense_target``
    the same hidden states of the dense reference, the inputs of one block's layers in it as far as they fit into an
    eighth of the free memory, and a frozen copy of the model as it was when the phase began.

    Args:
        model: what holds the weights.
        root_is_called: whether training calls ``model`` itself, rather than parts of it (as a LightningModule's
            ``training_step`` does).
        batches: how many of the last batches a block is solved on.
        dense_target: what a layer's outputs come close to: 0 its own outputs on what it sees now, 1 those that it had
            in the dense reference (so that later blocks make good for earlier ones), values between mix the two.
        reconstruction_steps: gradient steps on the whole block once its layers are solved, by the error of the block's
            output (:func:`~prox24_lightning.solvers.block_reconstruction.reconstruct_block`); 0 leaves them out, as for
            layers outside of blocks and for sharded models.
        gradient_weighting: in reconstruction, features of the block's output count by the squared gradients that the
            last training batches sent through them
            (:class:`~prox24_lightning.calibration.statistics.output_error.OutputGradients`).
        prox_steps: proximal steps a layer; None is the solver's own default, for convolutions on its short path.
        reorder_inputs: choose which inputs share a group of four, as the phase begins, where batches are run again
            (:mod:`~prox24_lightning.solvers.input_order.choose`).
        budget: share of the speed-up that is given back as the phase begins, for layers that stay dense
            (:mod:`~prox24_lightning.solvers.budget.price`).
        layer_times: name of a weight -> time of its product, dense and 2:4; None goes by multiply-adds.
        token_weighting: how far tokens count in a layer's Hessian by what an error there does to the block's output
            (:func:`~prox24_lightning.calibration.statistics.output_error.token_importance`): 0 all alike, 1 by that
            alone. Sharded models and experts count all alike.
        damping: of the layers' Hessians, relative to each diagonal entry.
        calibration: ``"auto"`` takes the first way that works, ``"stream"`` or ``"magnitude"`` that one.
        watch: shows and stops what is solved.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        root_is_called: bool = True,
        batches: int = CALIBRATION_BATCHES,
        dense_target: float = 0.5,
        reconstruction_steps: int = RECONSTRUCTION_STEPS,
        gradient_weighting: bool = True,
        prox_steps: int | None = None,
        calibration: CalibrationMode = "auto",
        reorder_inputs: bool = False,
        budget: float = 0.0,
        layer_times: LayerTimes | None = None,
        token_weighting: float = 0.0,
        damping: float = DAMPING,
        watch: SolveWatch | None = None,
    ) -> None:
        super().__init__()
        self.watch = SolveWatch() if watch is None else watch
        if calibration not in get_args(CalibrationMode):
            raise ValueError(
                f"calibration={calibration!r} is unknown; use one of {', '.join(get_args(CalibrationMode))}"
            )
        self.settings = SolveSettings(
            batches,
            dense_target,
            reconstruction_steps,
            gradient_weighting,
            prox_steps,
            reorder_inputs,
            budget,
            layer_times,
            token_weighting,
            damping,
        )
        self._model = model
        self._root_is_called = root_is_called
        self._way: _Way = "undecided" if calibration == "auto" else calibration
        self._calibration: Calibration | None = None
        self._begun = False
        self._done: set[str] = set()
        # Set when streaming takes over in the middle of a phase.
        self._since = 0
        self._before: set[str] = set()
        self._step = 0
        self._batches_seen = 0
        self._loaded: dict[str, Any] = {}

    def scaled_weights(self, weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
        if self._way == "magnitude":
            return list(weights)
        return [weight for weight in weights if why_not_solvable(weight.module, weight.parameter_name) is not None]

    def attach(self, context: RunContext) -> None:
        super().attach(context)
        state, self._loaded = self._loaded, {}
        if self._calibration is None:
            self._calibration = self._make()
        self._attach(state)

    def detach(self) -> None:
        if self._calibration is not None:
            self._calibration.detach()

    def before_batch(self, step: int) -> None:
        if self._calibration is None:
            return
        self._step = step
        if self._way == "undecided" and self._batches_seen:
            self._decide(last=self._batches_seen >= _PATIENCE)
        self._batches_seen += 1
        due = {
            block.name
            for block, turn in self._pruning_steps()
            if self._waits(block) and turn - self.settings.batches < step <= turn
        }
        # The batch after `start` shows in which order the model runs.
        self._calibration.begin_batch(due, everything=step == self.context.plan.start + 1)

    def after_batch(self) -> None:
        if self._calibration is not None:
            self._calibration.end_batch()

    @torch.no_grad()
    def begin(self) -> None:
        if self._way == "undecided":
            self._decide(last=True)
        self._begun = True
        try:
            calibration = self._require()
            with self.watch.pause(len(calibration.blocks), []):
                problem = calibration.begin()
        except RerunError as error:
            self._stream(str(error))
            return
        if problem is not None:
            self._warn_without_reference(problem)

    @torch.no_grad()
    def after_step(self, step: OptimizerStep) -> Masks:
        self._step = step.number
        try:
            self._require().after_step()
        except RerunError as error:
            self._stream(str(error))
        return self._solve([block for block, turn in self._pruning_steps() if turn <= step.number])

    def before_finish(self) -> None:
        if self.context.plan.freeze > 0 and not self._begun:
            self.begin()

    @torch.no_grad()
    def finish(self, weights: Sequence[GroupedWeight]) -> Masks:
        self.before_finish()
        masks: Masks = {}
        if self.context.plan.freeze > 0:  # at 0 no batch has been seen: the largest weights are kept
            masks = self._solve(self._require().blocks, last=True)
        for weight in weights:
            if weight.name not in masks:
                masks[weight.name] = self._projected(weight)
        self.detach()
        self._calibration = None
        return masks

    def _make(self) -> Calibration:
        if self._way in ("stream", "magnitude"):
            return StreamCalibration(self._model, self.settings, listen=self._way == "stream")
        return RerunCalibration(self._model, self.settings, root_is_called=self._root_is_called)

    def _attach(self, state: dict[str, Any]) -> None:
        weights = tuple(weight for weight in self.context.weights if weight.name not in self._before)
        self._require().attach(replace(self.context, weights=weights), state)

    def _require(self) -> Calibration:
        if self._calibration is None:
            raise RuntimeError("the strategy is not attached")
        return self._calibration

    def _decide(self, *, last: bool) -> None:
        """Take the first way that works on all ranks; ``last``: what is not known yet is taken to work."""
        calibration = self._require()
        assert isinstance(calibration, RerunCalibration)
        verdicts = gathered_objects(calibration.verdict())
        problem = next((found for found in verdicts if found), None)
        if problem is None and "" in verdicts and not last:
            return
        if problem is not None:
            self._stream(problem)
            return
        self._way = "rerun"
        if (problem := calibration.reference_problem()) is not None:
            self._warn_without_reference(problem)

    def _stream(self, problem: str) -> None:
        """From now on sum Hessians up from the training batches; all ranks call it."""
        self._require().detach()
        self._way, self._since, self._before = "stream", self._step, set(self._done)
        self._calibration = self._make()
        self._attach({})
        if rank() == 0:
            log.warning(
                "blocks are not run again, because %s: each layer is solved on a Hessian that forward hooks sum up in "
                "the training batches before its pruning step; dense_target, reconstruction_steps, reorder_inputs "
                "and budget have no effect (calibration='stream' if this is meant)",
                problem,
            )

    def _warn_without_reference(self, problem: str) -> None:
        if rank() == 0:
            log.warning(
                "dense_target=%g has no effect, each layer aims at its own outputs (dense_target=0 says so): %s",
                self.settings.dense_target,
                problem,
            )

    def _solve(self, blocks: Sequence[Block], *, last: bool = False) -> Masks:
        """Solve those of ``blocks`` that are not done; ``last``: what cannot be solved keeps its largest weights."""
        blocks = [block for block in blocks if self._waits(block)]
        if not blocks:
            return {}
        begin = time.perf_counter()
        masks: Masks = {}
        every = self._require().blocks
        done, watch = sum(not self._waits(block) for block in every), self.watch
        with watch.pause(len(every), [_cost(block) for block in blocks]), undone_on_error(_parameters(blocks)) as saved:
            try:
                watch.block(done + 1, blocks[0].name)
                for number, (block, found) in enumerate(self._require().solve(blocks), start=1):
                    watch.solved()
                    if number < len(blocks):
                        watch.block(done + number + 1, blocks[number].name)
                    for weight in block.weights:
                        mask = found.get(weight.name)
                        masks[weight.name] = self._projected(weight) if mask is None else mask
            except RerunError as error:
                left = [block for block in blocks if block.weights[0].name not in masks]
                saved.restore(_parameters(left))
                self._done.update(masks)
                self._stream(str(error))
                for weight in (weight for block in left if last for weight in block.weights):
                    masks[weight.name] = self._projected(weight)
        self._done.update(masks)
        pause = time.perf_counter() - begin
        self.solve_seconds += pause
        self.longest_pause = max(self.longest_pause, pause)
        return masks

    def _projected(self, weight: GroupedWeight) -> Tensor:
        return projected_mask(weight, self.context.scale_of(weight.name))

    def _waits(self, block: Block) -> bool:
        return any(weight.name not in self._done for weight in block.weights)

    def _pruning_steps(self) -> list[tuple[Block, int]]:
        """Every block and the step after which it is solved; the last one is solved at the freeze."""
        plan, blocks = self.context.plan, self._require().blocks
        start = min(max(plan.start, self._since), plan.freeze)
        span, count = plan.freeze - start, len(blocks)
        steps = max(1, min(count, span // min(self.settings.batches, _APART)))
        numbers = [i * steps // count + 1 for i in range(count)]
        return [(block, start - (-span * number // steps)) for block, number in zip(blocks, numbers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What the ranks have recorded is kept apart, rank by rank, in the state of the first."""
        return {
            "begun": self._begun,
            "done": sorted(self._done),
            "way": self._way,
            "since": self._since,
            "before": sorted(self._before),
            "calibration": {} if self._calibration is None else self._calibration.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        self._begun = state["begun"]
        self._done, self._before = set(state["done"]), set(state["before"])
        if self._way == "undecided":
            self._way = state["way"]
        if self._way == state["way"]:
            self._since = state["since"]
            self._loaded = state["calibration"]


def _cost(block: Block) -> float:
    """Return what solving a block costs, in a unit of its own: the products of its weights with their Hessians."""
    return sum(weight.parameter.numel() ** 2 / weight.parameter.shape[0] for weight in block.weights)


def _parameters(blocks: Sequence[Block]) -> set[Tensor]:
    inside = {parameter for block in blocks for parameter in block.module.parameters()}
    return inside | {weight.parameter for block in blocks for weight in block.weights}
