"""Calibrate on the training batches as they pass: Hessians from forward hooks, nothing is run twice."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.calls.eager_code import EagerCode, inside_compiled
from prox24_lightning.calibration.calls.hooks import before_call, in_backward, remove_all
from prox24_lightning.calibration.input_groups import InputGroupFinder
from prox24_lightning.calibration.statistics.expert_hessians import ExpertHessians
from prox24_lightning.calibration.statistics.streamed_hessian import StreamedHessian
from prox24_lightning.solvers.experts import solve_expert_weight
from prox24_lightning.solvers.input_group import solve_input_group
from prox24_lightning.sparsify.strategies.base import Masks, RunContext
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.calibration import Calibration, SolveSettings
from prox24_lightning.utils.distributed import from_first, gathered_on_first, rank, world_size
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.layer_matrix import from_matrix, matrix_columns, why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part, part_of

log = logging.getLogger(__name__)

_LISTENING = 16
"""So many batches at most are watched to see which layers share an input, and in which order they run."""


class StreamCalibration(Calibration):
    """Sums up the Hessian of each input group in the batches before its pruning step, while the model trains.

    What follows a pruned layer trains on before its own Hessian is summed up, so it sees the sparse layer. There is no
    dense reference, and no reconstruction. Memory: a Hessian for each input group whose pruning step is near.

    Args:
        listen: False leaves every weight to its magnitude.
    """

    def __init__(self, model: nn.Module, settings: SolveSettings, *, listen: bool = True) -> None:
        super().__init__(model, settings)
        self._listen = listen
        self._batches = 0
        self._finder = InputGroupFinder(hold=False)
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._hessians: dict[str, StreamedHessian] = {}
        self._groups: list[list[str]] = []
        self._eager = EagerCode()

    def attach(self, context: RunContext, state: dict[str, Any]) -> None:
        self.context = context
        if state:
            self._batches = state["batches"]
            self._groups = [list(group) for group in state["groups"]]
        self._arrange()
        by_name = {block.name: block for block in self.blocks}
        for name in state["sums"][0] if state else ():
            saved = [sums[name] for sums in state["sums"][rank() :: world_size()] if name in sums]
            block = by_name.get(name)
            if block is not None and saved:
                streamed = self._hessians.setdefault(name, StreamedHessian(block.weights[0]))
                streamed.accumulator.load_state_dict(saved, local_part(block.weights[0].parameter).device)

    def detach(self) -> None:
        self.end_batch()

    def begin_batch(self, due: Collection[str], *, everything: bool) -> None:
        if self._listening:
            self._take_groups()
        if self._listening:
            self._batches += 1
            for module in self._waiting():
                self._hook(module)
        for block in self.blocks:
            if block.name in due and _solvable(block):
                streamed = self._hessians.setdefault(block.name, StreamedHessian(block.weights[0]))
                streamed.begin_batch()
        if (self._listening or due) and inside_compiled(self.model):
            self._eager.begin()

    def end_batch(self) -> None:
        self._eager.end()
        remove_all(self._handles.values())
        self._handles.clear()
        for streamed in self._hessians.values():
            streamed.end_batch()

    def solve(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Masks]]:
        for block in blocks:
            yield block, self._solve(block)

    def _solve(self, block: Block) -> Masks:
        streamed = self._hessians.pop(block.name, None) or StreamedHessian(block.weights[0])
        streamed.end_batch()
        if not self._listen or not _solvable(block):
            return {}
        accumulator = streamed.accumulator
        first = block.weights[0]
        columns = first.parameter.shape[first.input_dim] if first.is_experts else matrix_columns(block.module)
        accumulator.all_reduce(columns, local_part(first.parameter).device)
        names = " + ".join(weight.module_name for weight in block.weights)
        between_pieces(names)
        if not accumulator.tokens:
            why = streamed.problem or "no training batch before its pruning step calls it"
            log.warning("%s: its inputs were not seen (%s); its largest weights are kept instead", names, why)
            return {}
        config = self.settings.solver(block.module)
        try:
            if isinstance(accumulator, ExpertHessians):
                return {first.name: solve_expert_weight(first, accumulator, config=config).mask}
            solved = solve_input_group(block.weights, accumulator, config=config)
        except ValueError as error:
            log.warning("%s; its largest weights are kept instead", error)
            return {}
        return {
            weight.name: part_of(from_matrix(weight.module, solution.mask), weight.parameter)
            for weight, solution in solved
        }

    @property
    def _listening(self) -> bool:
        return self._listen and self._batches <= _LISTENING and bool(self._waiting())

    def _waiting(self) -> list[nn.Module]:
        """Modules of weights that no batch has called so far."""
        seen = {name for group in self._groups for name in group}
        return list(dict.fromkeys(weight.module for weight in self.context.weights if weight.name not in seen))

    def _hook(self, module: nn.Module) -> None:
        if module not in self._handles:
            self._handles[module] = before_call(module, self._note)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Calls without gradients count too: of reentrant checkpointing they show the order of the forward pass.
        if not in_backward():
            with suppress(Exception):  # a call without a tensor: its order is not known
                self._finder.note(module, args, kwargs)

    def _take_groups(self) -> None:
        """Arrange the blocks by what has been called; as the first rank has seen it. All ranks call it."""
        names: dict[nn.Module, list[str]] = {}
        for weight in self.context.weights:
            names.setdefault(weight.module, []).append(weight.name)
        known = {name for group in self._groups for name in group}
        found = [[name for layer in group.layers for name in names[layer]] for group in self._finder.groups]
        self._finder = InputGroupFinder(hold=False)
        self._groups += from_first([group for group in found if not known.intersection(group)])
        self._arrange()

    def _arrange(self) -> None:
        weights = {weight.name: weight for weight in self.context.weights}
        parts = [[weights[name] for name in group if name in weights] for group in self._groups]
        seen = {name for group in self._groups for name in group}
        parts += [[weight] for weight in self.context.weights if weight.name not in seen]
        self.blocks = [_block(members) for part in parts for members in _by_kind(part)]

    def state_dict(self) -> dict[str, Any]:
        sums = {name: streamed.accumulator.state_dict() for name, streamed in self._hessians.items()}
        return {"batches": self._batches, "groups": self._groups, "sums": gathered_on_first(sums)}


def _by_kind(weights: Sequence[GroupedWeight]) -> Iterator[list[GroupedWeight]]:
    """Those of an input group that are solved together, and every other weight alone."""
    together = [weight for weight in weights if _is_solvable(weight) and not weight.is_experts]
    if together:
        yield together
    yield from ([weight] for weight in weights if weight.is_experts or not _is_solvable(weight))


def _block(weights: Sequence[GroupedWeight]) -> Block:
    return Block(weights[0].name, weights[0].module, tuple(weights))


def _solvable(block: Block) -> bool:
    return _is_solvable(block.weights[0])


def _is_solvable(weight: GroupedWeight) -> bool:
    return why_not_solvable(weight.module, weight.parameter_name) is None
