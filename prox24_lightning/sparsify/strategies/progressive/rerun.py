"""The recorded batches once more through units that share a turn: as the model is now, and as its dense copy was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_of, split_call
from prox24_lightning.calibration.dense_reference import DenseWeights
from prox24_lightning.calibration.module_inputs import Call, reach
from prox24_lightning.solvers.input_group import Run
from prox24_lightning.sparsify.strategies.progressive.blocks import Unit
from prox24_lightning.weights.sharded import runnable


@dataclass(frozen=True)
class Replay:
    """One call of a module of ``model``, as it is when it is made."""

    model: nn.Module
    call: Call
    module: nn.Module

    def __call__(self) -> Any:
        with runnable(self.model, self.module):
            return self.call(self.module)

    def arguments(self) -> tuple[Any, ...]:
        """What :meth:`with_arguments` takes. The hidden state asks for its gradient, as it does in training, so that
        what was compiled there serves here."""
        call = self.call
        with suppress(ValueError):  # without a floating tensor there is nothing to ask for
            rest, hidden = split_call(call.args, call.kwargs, "")
            call = call.with_value(rest.place, hidden.detach().requires_grad_())
        return call.args, call.kwargs, call.autocast, call.autocast_cache

    def with_arguments(self, arguments: tuple[Any, ...]) -> Replay:
        """The same call with those of another."""
        args, kwargs, autocast, cache = arguments
        return replace(self, call=Call(args, kwargs, autocast, autocast_cache=cache))


class Replays:
    """Calls of the units of one site, one a recorded call of the site, on what reaches them when their turn comes.

    One pass through the site finds what all of them are called with. A unit that takes the hidden state from the unit
    before it is then called on the outputs that this one has once it is solved, without another pass.

    Args:
        model: what holds the site.
        units: of one site, in the order in which they run; they are to be asked for in this order.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._model = model
        self._site = units[0].site
        self._now = _Walk(self._site.module, units, self._site.calls, partial(runnable, model))
        self._copy: _Walk | None = None
        if isinstance(self._site.dense, nn.Module):
            self._twins = self._site.twins()
            self._copy = _Walk(self._site.dense, units, self._site.calls, lambda _: nullcontext(), self._twins)

    def runs_of(self, unit: Unit) -> list[Replay]:
        """Calls of the unit in the model as it is now."""
        return [Replay(self._model, call, unit.module) for call in self._now.calls_of(unit)]

    def dense_runs_of(self, unit: Unit) -> tuple[list[Run] | None, dict[nn.Module, nn.Module] | None]:
        """The same of the unit as it was when the phase began, and its modules' twins there; None without a copy."""
        if self._copy is not None:
            return [partial(call, self._twins[unit.module]) for call in self._copy.calls_of(unit)], self._twins
        dense = self._site.dense
        if not isinstance(dense, DenseWeights):
            return None, None
        with dense.in_place(self._site.module), runnable(self._model, self._site.module):
            calls = reach(self._site.module, [unit.module], self._site.calls)[unit.module].calls
        return [partial(_run_dense, self._model, dense, call, unit.module) for call in calls], self._site.twins()

    def hand_on(
        self,
        unit: Unit,
        runs: Sequence[Run],
        dense_runs: Sequence[Run] | None,
        dense_outputs: Sequence[Tensor] | None = None,
    ) -> None:
        """The unit is solved: what it hands on reaches the next. ``dense_outputs`` where they are known already."""
        if self._now.wants(unit):
            self._now.outputs = outputs_of(unit, runs)
        if self._copy is not None and dense_runs is not None and self._copy.wants(unit):
            self._copy.outputs = list(dense_outputs or outputs_of(unit, dense_runs))


def outputs_of(unit: Unit, runs: Sequence[Run]) -> list[Tensor]:
    """What the unit hands on in each of ``runs``."""
    return [hidden_of(run(), unit.name).detach() for run in runs]


def mixed(outputs: Sequence[Tensor], dense_outputs: Sequence[Tensor] | None, dense_target: float) -> list[Tensor]:
    """What a unit shall hand on for each batch: its output as it is now, mixed with the dense copy's."""
    if dense_outputs is None:
        return list(outputs)
    return [now.lerp(dense.to(now), dense_target) for now, dense in zip(outputs, dense_outputs, strict=True)]


class _Walk:
    """One way of recorded calls from unit to unit."""

    def __init__(
        self,
        site: nn.Module,
        units: Sequence[Unit],
        calls: Sequence[Call],
        running: Callable[[nn.Module], AbstractContextManager[Any]],
        twins: dict[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.outputs: list[Tensor] | None = None
        self._site, self._calls, self._running = site, calls, running
        self._modules = {unit.name: twins[unit.module] if twins else unit.module for unit in units}
        self._next = dict(zip(list(self._modules), list(self._modules)[1:], strict=False))
        with running(site):
            self._passages = reach(site, list(self._modules.values()), calls)

    def wants(self, unit: Unit) -> bool:
        """Whether the next unit takes what this one hands on."""
        following = self._next.get(unit.name)
        return following is not None and self._modules[following] in self._passages

    def calls_of(self, unit: Unit) -> list[Call]:
        module = self._modules[unit.name]
        passage, outputs, self.outputs = self._passages.get(module), self.outputs, None
        if passage is not None and passage.place is None:
            return passage.calls
        if passage is not None and passage.place is not None and outputs is not None:
            pairs = zip(passage.calls, outputs, strict=True)
            return [call.with_value(passage.place, output) for call, output in pairs]
        with self._running(self._site):
            return reach(self._site, [module], self._calls)[module].calls


def _run_dense(model: nn.Module, dense: DenseWeights, call: Call, module: nn.Module) -> Any:
    with dense.in_place(module):
        return Replay(model, call, module)()
