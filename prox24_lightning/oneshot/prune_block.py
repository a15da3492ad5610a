"""Prune one block: find its input groups, take their Hessians on the pruned model's inputs, solve and record."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.config import PruneConfig
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.oneshot.pruning_report import LayerRecord, LayerwiseReport
from prox24_lightning.oneshot.reconstruct import reconstruct
from prox24_lightning.oneshot.work_dir import FinishedBlock, FinishedBlocks
from prox24_lightning.solvers.experts import solve_experts
from prox24_lightning.solvers.input_group import input_group_hessian, rerun_dense_inputs, solve_input_group
from prox24_lightning.solvers.input_order.choose import choose_order, proved_orders
from prox24_lightning.solvers.layer import Solution
from prox24_lightning.weights.free_order import reorder
from prox24_lightning.weights.layer_matrix import from_matrix
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight

logger = logging.getLogger(__name__)

Runs = Sequence[Callable[[], Any]]
"""Each calls a block on one calibration batch."""


@dataclass
class BlockPruner:
    """Prunes the blocks of a model one after the other, in the order of execution.

    Attributes:
        config: of the run.
        inputs: of the current block in the model as it is pruned.
        dense_inputs: of the current block in the dense model; None without ``dense_target``.
        finished: blocks of an earlier run in ``work_dir``; None without one.
        report: receives what is pruned.
        progress: the bar.
        holders: parameter -> in how many places of the model it is.
        buffers: receives the buffers that have moved, by name: those of the isolated model are copies.
        notes: what the rows of layers say in the report.
    """

    config: PruneConfig
    inputs: BlockInputs
    dense_inputs: BlockInputs | None
    finished: FinishedBlocks | None
    report: LayerwiseReport
    progress: LayerProgress
    holders: Mapping[Tensor, int]
    buffers: dict[str, Tensor]
    notes: Mapping[nn.Module, str]

    def prune(self, index: int, weights: list[GroupedWeight]) -> None:
        """Prune ``weights`` of block ``index``, or load them from a finished run, and move all inputs past it."""
        with self.inputs.on_device(index) as block:
            saved = None if self.finished is None else self.finished.load(index)
            notes = dict(self.notes)
            moves = saved.moves if saved is not None else self._choose_orders(index, block, weights, notes)
            self._move(index, block, moves)
            dense = self._dense_copy(index, block)
            if saved is not None:
                self._restore(index, weights, saved)
            elif weights:
                done = self._solve(index, block, dense, weights, moves, notes)
                self._reconstruct(index, block, dense, weights, done)
                self._note(done)
                if self.finished is not None:
                    self.finished.save(index, done)
            self.report.dims.update({weight.name: weight.dim for weight in weights if weight.name in self.report.masks})
            with self._rounded_inputs(weights):
                self.inputs.advance(index, block)
            if self.dense_inputs is not None and dense is not None:
                self.dense_inputs.advance(index, dense)

    def _rounded_inputs(self, weights: Sequence[GroupedWeight]) -> AbstractContextManager[None]:
        """Let the linear layers see the inputs that they will have in 8 bits, if they are to be rounded."""
        linear = [weight.module for weight in weights if weight.parameter.dim() == 2]
        return rounded_inputs(linear, self.config.solver.weights)

    def _dense_copy(self, index: int, block: nn.Module) -> nn.Module | None:
        if self.dense_inputs is None:
            return None
        try:
            return copy.deepcopy(block)
        except Exception as error:  # of the user's own objects: a lock, an open file
            name = self.inputs.blocks.names[index] or type(block).__name__
            logger.warning("%s cannot be copied (%s): from here on the run goes on with dense_target=0", name, error)
            self.dense_inputs = None
            return None

    def _choose_orders(
        self, index: int, block: nn.Module, weights: list[GroupedWeight], notes: dict[nn.Module, str]
    ) -> dict[str, Tensor]:
        """Return the moves of inputs into the order that loses least, where it is free; add to ``notes``."""
        moves: dict[str, Tensor] = {}
        if not (self.config.reorder_inputs and weights):
            return moves
        runs = self.inputs.runs(index, block)
        found, reasons = proved_orders(block, runs[0], weights, self.holders)
        layers = {weight.module: weight for weight in weights if not weight.is_experts}
        for layer, reason in reasons.items():
            logger.info("the order of the inputs of %s is fixed: %s", layers[layer].module_name, reason)
        names = {tensor: name for name, tensor in self._tensors(index, block).items()}
        for free in found:
            self.progress.describe(f"order of inputs in {self.inputs.blocks.names[index] or type(block).__name__}")
            chosen = choose_order(free, layers, runs)
            if chosen is not None:
                notes.update(dict.fromkeys(free.consumers, chosen.note))
                moves |= {f"{part.dim}.{names[part.tensor]}": part.index(chosen.order) for part in free.tensors}
        return moves

    def _move(self, index: int, block: nn.Module, moves: Mapping[str, Tensor]) -> None:
        tensors = self._tensors(index, block)
        for key, places in moves.items():
            dim, _, name = key.partition(".")
            reorder(tensors[name], int(dim), places)
            if not isinstance(tensors[name], nn.Parameter):
                self.buffers[name] = tensors[name]

    def _restore(self, index: int, weights: list[GroupedWeight], saved: FinishedBlock) -> None:
        for weight in weights:
            if weight.name in saved.weights:
                weight.parameter.copy_(saved.weights[weight.name])
        self._note(saved)
        self.report.seconds += sum(record.seconds for record in saved.records)
        self.progress.step(len(weights), self.inputs.blocks.names[index])

    def _note(self, block: FinishedBlock) -> None:
        self.report.masks.update(block.masks)
        self.report.layers += block.records
        self.report.skipped += block.skipped

    def _tensors(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Return the parameters and buffers of a block by their names in the model."""
        prefix = "" if self.inputs.blocks.whole else f"{self.inputs.blocks.names[index]}."
        tensors = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
        return {clean_name(f"{prefix}{name}"): tensor for name, tensor in tensors}

    def _solve(
        self,
        index: int,
        block: nn.Module,
        dense: nn.Module | None,
        weights: list[GroupedWeight],
        moves: dict[str, Tensor],
        notes: Mapping[nn.Module, str],
    ) -> FinishedBlock:
        layers = {weight.module: weight for weight in weights if not weight.is_experts}
        experts: dict[nn.Module, list[GroupedWeight]] = {}
        for weight in weights:
            if weight.is_experts:
                experts.setdefault(weight.module, []).append(weight)
        runs = self.inputs.runs(index, block)
        dense_inputs = None
        if self.dense_inputs is not None and dense is not None:
            references = dict(zip(block.modules(), dense.modules(), strict=True))
            dense_inputs = rerun_dense_inputs(self.dense_inputs.runs(index, dense), references)
        groups = find_input_groups([*layers, *experts], runs[0])
        check_same_input_groups(groups, {weight.module: weight.name for weight in weights})
        called = {layer for group in groups for layer in group.layers}
        done = FinishedBlock({}, {}, [], [], moves)
        for weight in weights:
            if weight.module not in called:
                done.skipped.append(skipped_weight(weight, "not called by the first calibration batch"))
                self.progress.step(1, weight.module_name)
        for group in groups:
            if group.layers[0] in experts:
                self._solve_experts(index, experts[group.layers[0]], runs, done)
                continue
            with self._rounded_inputs(weights):
                bounded = self.config.solver.weights is not None
                hessian = input_group_hessian(group, runs, dense_inputs, bounded=bounded)
            members = [layers[layer] for layer in group.layers]
            solved = solve_input_group(
                members, hessian, config=self.config.solver, dense_target=self.config.dense_target
            )
            for weight, solution in solved:
                mask = from_matrix(weight.module, solution.mask)
                remarks = [note for note in (notes.get(weight.module), _note_on(hessian)) if note]
                self._add(done, index, weight, mask, solution, hessian.tokens, "; ".join(remarks))
                self.progress.step(1, weight.module_name)
        return done

    def _reconstruct(
        self, index: int, block: nn.Module, dense: nn.Module | None, weights: list[GroupedWeight], done: FinishedBlock
    ) -> None:
        """Refine the solved weights together; what keeps them from that is named in a warning."""
        steps, name = self.config.reconstruct_steps, self.inputs.blocks.names[index]
        if not steps or dense is None or self.dense_inputs is None or not done.masks:
            return
        if self.inputs.blocks.whole:
            logger.warning("reconstruct_steps=%d is left out: it takes a chain of blocks", steps)
            return
        self.progress.describe(f"reconstruction of {name}")
        linear = [weight for weight in weights if not weight.is_experts]
        try:
            with self._rounded_inputs(weights):
                reconstruct(
                    index,
                    block,
                    dense,
                    self.inputs,
                    self.dense_inputs,
                    linear,
                    done.masks,
                    steps,
                    self.config.solver.weights,
                )
        except Exception as error:  # of the user's forward under gradients
            logger.warning("%s is not reconstructed: %s", name, error)

    def _solve_experts(self, index: int, weights: list[GroupedWeight], runs: Runs, done: FinishedBlock) -> None:
        for found in solve_experts(weights, runs, config=self.config.solver):
            self._add(done, index, found.weight, found.mask, found.solution, sum(found.tokens), found.note)
        for weight in weights:
            if weight.name not in done.masks:
                done.skipped.append(skipped_weight(weight, "experts whose products cannot be observed"))
        self.progress.step(len(weights), weights[0].module_name)

    def _add(
        self,
        done: FinishedBlock,
        index: int,
        weight: GroupedWeight,
        mask: Tensor,
        solution: Solution,
        tokens: int,
        note: str,
    ) -> None:
        record = LayerRecord(
            name=weight.name,
            block=self.inputs.blocks.names[index],
            shape=tuple(weight.parameter.shape),
            tokens=tokens,
            loss=solution.loss,
            refined_loss=solution.refined_loss,
            reached=solution.reached,
            seconds=solution.seconds,
            note=note,
            rounded_loss=solution.rounded_loss,
        )
        done.records.append(record)
        done.weights[weight.name] = weight.parameter
        done.masks[weight.name] = mask.cpu()


def skipped_weight(weight: GroupedWeight, reason: str) -> SkippedWeight:
    """Return the report's line on a weight that stays dense."""
    return SkippedWeight(weight.name, type(weight.module).__name__, tuple(weight.parameter.shape), reason)


def _note_on(accumulator: HessianAccumulator) -> str:
    hessian = accumulator.hessian
    if not bool(hessian.diagonal().any()):
        return "inputs are all zero: mask by magnitude"
    if accumulator.tokens < len(hessian):
        return f"fewer tokens ({accumulator.tokens}) than inputs ({len(hessian)})"
    return ""
