"""Calls of neighbouring blocks on the recorded batches: in the model as it is now, and in its dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.calls.inner_calls import inner_calls
from prox24_lightning.calibration.calls.module_call import ModuleCall, device_of
from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.calibration.dense_reference import DenseWeights
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.solvers.input_group import Run
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.sharded import is_fsdp, runnable


@dataclass(frozen=True)
class BlockRun:
    """One call of a module, on the weights that it has when the call is made.

    Attributes:
        model: what is searched for FSDP2 modules around ``module``, or ``module`` itself where there are none.
    """

    model: nn.Module
    call: ModuleCall
    module: nn.Module

    def __call__(self) -> Any:
        with runnable(self.model, self.module):
            return self.call(self.module)

    def arguments(self) -> tuple[Any, ...]:
        """Return what :meth:`with_arguments` takes. The hidden state asks for its gradient, as it does in training, so
        that what was compiled there serves here."""
        call = self.call
        with suppress(ValueError):  # without a floating tensor there is nothing to ask for
            place = call.hidden_place("")
            call = call.with_argument(place, call.argument(place).detach().requires_grad_())
        return call.args, call.kwargs, call.autocast, call.autocast_cache, call.random

    def with_arguments(self, arguments: tuple[Any, ...]) -> BlockRun:
        """Return the same call with those of another."""
        args, kwargs, autocast, cache, random = arguments
        return replace(self, call=ModuleCall(args, kwargs, autocast, cache, random=random))

    def draws(self) -> bool:
        """Whether the call draws random numbers."""
        if self.call.random is None:
            return False
        self()
        return not self.call.random.same_as(RandomState.now(device_of(self.module)))


class BlockReruns:
    """Calls of neighbouring blocks, one for each recorded call of the hooked module, on what reaches them now.

    One rerun of each recorded call finds what all blocks are called with. A block that takes the hidden state from the
    block before it is then called on what that one returns once it is solved, without another rerun. Hidden states are
    kept of one block at a time, in each of the two models: memory does not grow with the number of blocks.

    Args:
        model: what holds the hooked module.
        hooked: the hooked module that holds the blocks.
        blocks: in the order in which they run; they are to be asked for in this order, once each.
        calls: of the hooked module.
    """

    def __init__(
        self, model: nn.Module, hooked: HookedModule, blocks: Sequence[Block], calls: Sequence[ModuleCall]
    ) -> None:
        self._model = model
        # Found out once: a walk through the model for every call takes as long as some of the calls.
        self._sharded = any(map(is_fsdp, model.modules()))
        self._hooked = hooked
        self._calls = calls
        modules = {block.name: block.module for block in blocks}
        self._now = _Path(hooked.module, modules, calls, partial(runnable, model))
        self._dense: _Path | None = None
        if isinstance(hooked.reference, nn.Module):
            self._counterparts = hooked.counterparts()
            modules = {block.name: self._counterparts[block.module] for block in blocks}
            self._dense = _Path(hooked.reference, modules, calls, lambda _: nullcontext())

    def runs_of(self, block: Block) -> list[BlockRun]:
        """Return the calls of the block in the model as it is now."""
        model = self._model if self._sharded else block.module
        return [BlockRun(model, call, block.module) for call in self._now.calls_of(block)]

    def dense_runs_of(self, block: Block) -> tuple[list[Run] | None, dict[nn.Module, nn.Module] | None]:
        """Return the same in the dense reference, and the counterparts of its modules; None without a reference."""
        if self._dense is not None:
            module = self._counterparts[block.module]
            dense: list[Run] = [partial(call, module) for call in self._dense.calls_of(block)]
            return dense, self._counterparts
        reference = self._hooked.reference
        if not isinstance(reference, DenseWeights):
            return None, None
        with reference.in_place(self._hooked.module), runnable(self._model, self._hooked.module):
            calls = inner_calls(self._hooked.module, [block.module], self._calls)[block.module].calls
        runs: list[Run] = [partial(_run_dense, self._model, reference, call, block.module) for call in calls]
        return runs, self._hooked.counterparts()

    def pass_on(
        self,
        block: Block,
        runs: Sequence[Run],
        dense_runs: Sequence[Run] | None,
        dense_outputs: Sequence[Tensor] | None = None,
    ) -> None:
        """The block is solved: its outputs reach the next one. ``dense_outputs`` where they are known already."""
        if self._now.is_chained(block):
            self._now.outputs = outputs_of(block, runs)
        if self._dense is not None and dense_runs is not None and self._dense.is_chained(block):
            self._dense.outputs = list(dense_outputs or outputs_of(block, dense_runs))


def outputs_of(block: Block, runs: Sequence[Run]) -> list[Tensor]:
    """Return the hidden state that the block returns in each of ``runs``."""
    found = []
    for run in runs:
        between_pieces()
        found.append(hidden_state(run(), block.name).detach())
    return found


def mixed(outputs: Sequence[Tensor], dense_outputs: Sequence[Tensor] | None, dense_target: float) -> list[Tensor]:
    """Return what a block is to return for each batch: its outputs now, mixed with those of the dense reference."""
    if dense_outputs is None:
        return list(outputs)
    return [now.lerp(dense.to(now), dense_target) for now, dense in zip(outputs, dense_outputs, strict=True)]


class _Path:
    """The way of recorded calls from block to block, in one of the two models.

    Args:
        outer: what the calls are made of.
        modules: the blocks inside, by name.
        running: makes ``outer`` callable.
    """

    def __init__(
        self,
        outer: nn.Module,
        modules: dict[str, nn.Module],
        calls: Sequence[ModuleCall],
        running: Callable[[nn.Module], AbstractContextManager[Any]],
    ) -> None:
        self.outputs: list[Tensor] | None = None
        self._outer, self._calls, self._running = outer, calls, running
        self._modules = modules
        self._next = dict(zip(list(modules), list(modules)[1:], strict=False))
        with running(outer):
            self._inner = inner_calls(outer, list(modules.values()), calls)

    def is_chained(self, block: Block) -> bool:
        """Whether the next block takes what this one returns."""
        following = self._next.get(block.name)
        return following is not None and self._modules[following] in self._inner

    def calls_of(self, block: Block) -> list[ModuleCall]:
        module = self._modules[block.name]
        inner, outputs, self.outputs = self._inner.pop(module, None), self.outputs, None
        if inner is not None and not inner.chained:
            return inner.calls
        if inner is not None and outputs is not None:
            return [call.with_hidden(output) for call, output in zip(inner.calls, outputs, strict=True)]
        with self._running(self._outer):
            return inner_calls(self._outer, [module], self._calls)[module].calls


def _run_dense(model: nn.Module, dense: DenseWeights, call: ModuleCall, module: nn.Module) -> Any:
    with dense.in_place(module):
        return BlockRun(model, call, module)()
