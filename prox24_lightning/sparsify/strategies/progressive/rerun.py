"""The recorded batches once more through blocks that share a turn: as the model is now, and as its dense copy was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.dense_reference import DenseWeights
from prox24_lightning.calibration.inner_calls import inner_calls
from prox24_lightning.calibration.module_call import ModuleCall
from prox24_lightning.solvers.input_group import Run
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.weights.sharded import runnable


@dataclass(frozen=True)
class BlockRun:
    """One call of a module of ``model``, as it is when it is made."""

    model: nn.Module
    call: ModuleCall
    module: nn.Module

    def __call__(self) -> Any:
        with runnable(self.model, self.module):
            return self.call(self.module)

    def arguments(self) -> tuple[Any, ...]:
        """What :meth:`with_arguments` takes. The hidden state asks for its gradient, as it does in training, so that
        what was compiled there serves here."""
        call = self.call
        with suppress(ValueError):  # without a floating tensor there is nothing to ask for
            place = call.hidden_place("")
            call = call.with_argument(place, call.argument(place).detach().requires_grad_())
        return call.args, call.kwargs, call.autocast, call.autocast_cache

    def with_arguments(self, arguments: tuple[Any, ...]) -> BlockRun:
        """The same call with those of another."""
        args, kwargs, autocast, cache = arguments
        return replace(self, call=ModuleCall(args, kwargs, autocast, autocast_cache=cache))


class BlockReruns:
    """Calls of neighbouring blocks, one for each recorded call of the hooked module, on what reaches them now.

    One rerun of each recorded call finds what all blocks are called with. A block that takes the hidden state from the
    block before it is then called on what that one returns once it is solved, without another rerun.

    Args:
        model: what holds the hooked module.
        blocks: of one hooked module, in the order in which they run; they are to be asked for in this order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._model = model
        self._hooked = blocks[0].hooked
        self._now = _Path(self._hooked.module, blocks, self._hooked.calls, partial(runnable, model))
        self._copy: _Path | None = None
        if isinstance(self._hooked.dense, nn.Module):
            self._reference = self._hooked.reference_of()
            self._copy = _Path(self._hooked.dense, blocks, self._hooked.calls, lambda _: nullcontext(), self._reference)

    def runs_of(self, block: Block) -> list[BlockRun]:
        """Calls of the block in the model as it is now."""
        return [BlockRun(self._model, call, block.module) for call in self._now.calls_of(block)]

    def dense_runs_of(self, block: Block) -> tuple[list[Run] | None, dict[nn.Module, nn.Module] | None]:
        """The same in the dense reference, and the counterparts of its modules there; None without a reference."""
        if self._copy is not None:
            return [
                partial(call, self._reference[block.module]) for call in self._copy.calls_of(block)
            ], self._reference
        dense = self._hooked.dense
        if not isinstance(dense, DenseWeights):
            return None, None
        with dense.in_place(self._hooked.module), runnable(self._model, self._hooked.module):
            calls = inner_calls(self._hooked.module, [block.module], self._hooked.calls)[block.module].calls
        return [
            partial(_run_dense, self._model, dense, call, block.module) for call in calls
        ], self._hooked.reference_of()

    def hand_on(
        self,
        block: Block,
        runs: Sequence[Run],
        dense_runs: Sequence[Run] | None,
        dense_outputs: Sequence[Tensor] | None = None,
    ) -> None:
        """The block is solved: what it hands on reaches the next. ``dense_outputs`` where they are known already."""
        if self._now.wants(block):
            self._now.outputs = outputs_of(block, runs)
        if self._copy is not None and dense_runs is not None and self._copy.wants(block):
            self._copy.outputs = list(dense_outputs or outputs_of(block, dense_runs))


def outputs_of(block: Block, runs: Sequence[Run]) -> list[Tensor]:
    """What the block hands on in each of ``runs``."""
    return [hidden_state(run(), block.name).detach() for run in runs]


def mixed(outputs: Sequence[Tensor], dense_outputs: Sequence[Tensor] | None, dense_target: float) -> list[Tensor]:
    """What a block shall hand on for each batch: its output as it is now, mixed with the dense copy's."""
    if dense_outputs is None:
        return list(outputs)
    return [now.lerp(dense.to(now), dense_target) for now, dense in zip(outputs, dense_outputs, strict=True)]


class _Path:
    """One way of recorded calls from block to block."""

    def __init__(
        self,
        outer: nn.Module,
        blocks: Sequence[Block],
        calls: Sequence[ModuleCall],
        running: Callable[[nn.Module], AbstractContextManager[Any]],
        reference: dict[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.outputs: list[Tensor] | None = None
        self._outer, self._calls, self._running = outer, calls, running
        self._modules = {block.name: reference[block.module] if reference else block.module for block in blocks}
        self._next = dict(zip(list(self._modules), list(self._modules)[1:], strict=False))
        with running(outer):
            self._inner = inner_calls(outer, list(self._modules.values()), calls)

    def wants(self, block: Block) -> bool:
        """Whether the next block takes what this one hands on."""
        following = self._next.get(block.name)
        return following is not None and self._modules[following] in self._inner

    def calls_of(self, block: Block) -> list[ModuleCall]:
        module = self._modules[block.name]
        inner, outputs, self.outputs = self._inner.get(module), self.outputs, None
        if inner is not None and not inner.chained:
            return inner.calls
        if inner is not None and outputs is not None:
            return [call.with_hidden(output) for call, output in zip(inner.calls, outputs, strict=True)]
        with self._running(self._outer):
            return inner_calls(self._outer, [module], self._calls)[module].calls


def _run_dense(model: nn.Module, dense: DenseWeights, call: ModuleCall, module: nn.Module) -> Any:
    with dense.in_place(module):
        return BlockRun(model, call, module)()
