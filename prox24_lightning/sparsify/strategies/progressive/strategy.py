"""The progressive strategy: block after block goes 2:4 by the local squared loss, while the rest trains on."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.hooked_module import HookedModule, share_of
from prox24_lightning.calibration.outermost import outermost_modules, parts_with
from prox24_lightning.calibration.output_gradients import OutputGradients
from prox24_lightning.sparsify.strategies.base import Masks, OptimizerStep, RunContext, Strategy, projected_mask
from prox24_lightning.sparsify.strategies.progressive.blocks import (
    Block,
    check_same_order,
    cut_into_blocks,
    order_of_blocks,
)
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns
from prox24_lightning.sparsify.strategies.progressive.solve_block import solve_block
from prox24_lightning.utils.cuda_graphs import GraphMemory
from prox24_lightning.utils.distributed import gathered_on_first, rank
from prox24_lightning.utils.tensors import map_tensors
from prox24_lightning.weights.layer_matrix import why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded, runnable

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 8
"""Batches on which a block is solved: the last ones of the training itself."""
RECONSTRUCTION_STEPS = 96
"""Gradient steps on a block whose layers have been solved."""
_SHARED = 4
"""So many blocks at most share one pass of the recorded batches: what it finds for each is kept meanwhile."""


class Progressive(Strategy):
    """One block after the other, in the order in which the model runs them, spread evenly over the sparsify phase.

    Turns are at least ``batches`` steps apart, where the phase is short several blocks have theirs together. When its
    turn comes, the last training batches run once more through the model as it is now, up to that block. Its
    layers are solved one after the other on what they see then, by the paper's layer-wise prox and masked gradient
    (arXiv 2501.18015, section 3), and frozen; everything that comes after trains on against the sparse block. A model
    without a list of like blocks goes layer after layer. A layer that the solver cannot take (a packed attention
    projection, a grouped convolution) is projected in the metric instead.

    In a distributed run every rank runs its own batches, the Hessians are summed over the ranks, and every rank solves
    the whole layer, gathered if it is sharded.

    Memory: the arguments of the last batches' calls, the Hessian of one layer, float32 (in_features,
    in_features), and with ``dense_target`` a frozen copy of the model as it was when the phase began.

    Args:
        model: what holds the weights.
        root_is_called: whether training calls ``model`` itself, rather than parts of it (as a LightningModule's
            ``training_step`` does).
        batches: how many of the last batches a block is solved on.
        dense_target: what a layer's outputs shall come close to: 0 its own outputs on what it sees now, 1 those that it
            had in the dense copy (so that later blocks make good for earlier ones), values between mix the two.
        reconstruction_steps: gradient steps on the whole block once its layers are solved, by the error of the block's
            output (:func:`~prox24_lightning.solvers.block_reconstruction.reconstruct_block`); 0 leaves them out, as for
            layers outside of blocks and for sharded models.
        gradient_weighting: in reconstruction, features of the block's output count by the squared gradients that the
            last training batches sent through them
            (:class:`~prox24_lightning.calibration.output_gradients.OutputGradients`).
        prox_steps: proximal steps a layer; None is the solver's own default.
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
    ) -> None:
        super().__init__()
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        if not 0 <= dense_target <= 1:
            raise ValueError(f"dense_target={dense_target} must lie in [0, 1]")
        if reconstruction_steps < 0:
            raise ValueError(f"reconstruction_steps={reconstruction_steps} must be 0 or more")
        if prox_steps is not None and prox_steps < 1:
            raise ValueError(f"prox_steps={prox_steps} must be at least 1")
        self.batches = batches
        self.dense_target = dense_target
        self.reconstruction_steps = reconstruction_steps
        self.gradient_weighting = gradient_weighting
        self.prox_steps = prox_steps
        self._model = model
        self._root_is_called = root_is_called
        self._numbers = itertools.count()
        self._graph_memory = GraphMemory()
        self._hooked: list[HookedModule] = []
        self._blocks: list[Block] = []
        self._order: list[str] = []
        self._done: set[str] = set()
        self._gradients: dict[str, OutputGradients] = {}
        self._begun = False
        self._batches_seen = 0
        self._loaded: dict[str, Any] = {}

    def scaled_weights(self, weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
        return [weight for weight in weights if why_not_solvable(weight.module, weight.parameter_name) is not None]

    def attach(self, context: RunContext) -> None:
        super().attach(context)
        weights = context.weights
        state, self._loaded = self._loaded, {}
        modules = [weight.module for weight in weights]
        if state:
            names = dict(self._model.named_modules())
            found = [names[name] for name in state["hooked"]]
        elif self._hooked:
            found = [hooked.module for hooked in self._hooked]
        else:
            found = outermost_modules(self._model, modules, root_is_called=self._root_is_called)
        if [hooked.module for hooked in self._hooked] != found:
            self._hooked = [HookedModule(module, self.batches, self._numbers) for module in found]
        self._blocks = cut_into_blocks(self._model, weights, self._hooked)
        for index, hooked in enumerate(self._hooked if state else ()):
            hooked.load_state_dict(share_of([saved[index] for saved in state["calls"]]))
            hooked.load_dense(state["dense"][index], sharded=self._sharded)
        totals = {name: found.total for name, found in self._gradients.items()}
        if state:
            totals = state["gradients"][rank() % len(state["gradients"])]
        self._gradients = {
            u.name: OutputGradients(u.name, u.module, u.feature_dim, totals[u.name])
            for u in self._blocks
            if u.name in totals
        }
        self._arrange(state.get("order", self._order))
        for hooked in self._hooked:
            hooked.attach()

    def detach(self) -> None:
        for hooked in self._hooked:
            hooked.detach()
        for gradients in self._gradients.values():
            gradients.detach()
        self._graph_memory.release()

    def before_batch(self, step: int) -> None:
        if not all(hooked.called for hooked in self._hooked) and self._batches_seen:
            self._descend()
        self._batches_seen += 1
        soon = [
            block
            for block, turn in self._turns()
            if block.name not in self._done and turn - self.batches < step <= turn
        ]
        for block in soon if self.gradient_weighting else ():
            if block.name not in self._gradients and self._reconstructs(block):
                self._gradients[block.name] = OutputGradients(block.name, block.module, block.feature_dim)
        # The step after `start` is recorded everywhere: it shows in which order the model runs.
        wanted = {block.hooked for block in (self._blocks if step == self.context.plan.start + 1 else soon)}
        for hooked in self._hooked:
            hooked.next_batch(hooked in wanted)

    @torch.no_grad()
    def begin(self) -> None:
        self._begun = True
        with ExitStack() as stack:
            for hooked in self._hooked:
                stack.enter_context(runnable(self._model, hooked.module))
            self._arrange(order_of_blocks(self._blocks))
        check_same_order(self._blocks)
        # Only of a single hooked the inputs do not depend on what is pruned, so only there a dense model can follow.
        if self.dense_target and len(self._hooked) == 1 and self._blocks:
            self._hooked[0].keep_dense(sharded=self._sharded)
        elif self.dense_target and self._blocks and rank() == 0:
            log.warning(
                "dense_target=%g has no effect, each layer aims at its own outputs: training calls %d parts of the "
                "model (%s, ...) rather than one that holds all of them",
                self.dense_target,
                len(self._hooked),
                type(self._hooked[0].module).__name__,
            )

    @torch.no_grad()
    def after_step(self, step: OptimizerStep) -> Masks:
        due = [block for block, turn in self._turns() if block.name not in self._done and turn <= step.number]
        return self._solve_all(due)

    @torch.no_grad()
    def finish(self, weights: Sequence[GroupedWeight]) -> Masks:
        if not self._begun:
            self.begin()
        masks = self._solve_all([block for block in self._blocks if block.name not in self._done])
        self.detach()
        self._hooked, self._blocks, self._order = [], [], []
        return masks

    def _solve_all(self, blocks: Sequence[Block]) -> Masks:
        if not blocks:
            return {}
        begin = time.perf_counter()
        masks: Masks = {}
        for hooked in dict.fromkeys(block.hooked for block in blocks):
            if (left_out := hooked.leave_out_unsound()) and rank() == 0:
                log.warning(
                    "NaN or infinity in %d of the last training batches: blocks are solved without them", left_out
                )
        for together in self._groups(blocks):
            hooked = together[0].hooked
            with hooked.rerunning(), self._graph_memory.shared():
                reruns = BlockReruns(self._model, together)
                for block in together:
                    steps = self.reconstruction_steps if self._reconstructs(block) else 0
                    gradients = self._gradients.get(block.name)
                    masks |= solve_block(
                        block, reruns, self.dense_target, self.prox_steps, steps, gradients, self.context.trained
                    )
        for block in blocks:
            self._done.add(block.name)
            if (gradients := self._gradients.pop(block.name, None)) is not None:
                gradients.detach()
            for weight in block.weights:
                if weight.name not in masks:
                    masks[weight.name] = projected_mask(weight, self.context.scale_of(weight.name))
        pause = time.perf_counter() - begin
        self.solve_seconds += pause
        self.longest_pause = max(self.longest_pause, pause)
        return masks

    def _groups(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Neighbours of one hooked, which share a pass of the recorded batches; of sharded models each for itself."""
        groups: list[list[Block]] = []
        for block in blocks:
            last = groups[-1] if groups else []
            if last and last[-1].hooked is block.hooked and len(last) < _SHARED and not self._sharded:
                last.append(block)
            else:
                groups.append([block])
        return groups

    def _reconstructs(self, block: Block) -> bool:
        outside = any(weight.module is block.module for weight in block.weights)
        return self.reconstruction_steps > 0 and not outside and not self._sharded

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(weight.parameter) for weight in self.context.weights)

    def _turns(self) -> list[tuple[Block, int]]:
        """Every block and the step after which it is solved; the last one has its turn at the freeze."""
        span, count = self.context.plan.freeze - self.context.plan.start, len(self._blocks)
        turns = max(1, min(count, span // self.batches))
        numbers = [i * turns // count + 1 for i in range(count)]
        return [
            (block, self.context.plan.start - (-span * number // turns))
            for block, number in zip(self._blocks, numbers, strict=True)
        ]

    def _descend(self) -> None:
        """A batch has passed without a call of some hooked: look at the modules inside it instead."""
        modules = [weight.module for weight in self.context.weights]
        found = []
        for hooked in self._hooked:
            inner = [] if hooked.called else parts_with(hooked.module, modules)
            found += inner or [hooked.module]
        if found == [hooked.module for hooked in self._hooked]:
            return
        self.detach()
        self._gradients.clear()
        kept = {hooked.module: hooked for hooked in self._hooked}
        self._hooked = [kept.get(module) or HookedModule(module, self.batches, self._numbers) for module in found]
        self._blocks = cut_into_blocks(self._model, self.context.weights, self._hooked)
        for hooked in self._hooked:
            hooked.attach()

    def _arrange(self, order: Sequence[str]) -> None:
        place = {name: position for position, name in enumerate(order)}
        self._order = list(order)
        self._blocks.sort(key=lambda block: place.get(block.name, len(place)))

    def state_dict(self) -> dict[str, Any]:
        """What the ranks have recorded is kept apart, rank by rank, in the state of the first."""
        names = {module: name for name, module in self._model.named_modules()}
        return {
            "begun": self._begun,
            "done": sorted(self._done),
            "order": list(self._order),
            "hooked": [names[hooked.module] for hooked in self._hooked],
            "calls": gathered_on_first([hooked.state_dict() for hooked in self._hooked]),
            "dense": [hooked.dense_state() for hooked in self._hooked],
            "gradients": gathered_on_first(
                map_tensors(lambda total: total.cpu(), {name: found.total for name, found in self._gradients.items()})
            ),
        }

    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, GroupedWeight]) -> None:
        self._begun = state["begun"]
        self._done = set(state["done"])
        self._loaded = state
