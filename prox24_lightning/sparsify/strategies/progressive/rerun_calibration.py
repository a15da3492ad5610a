"""Calibrate by running the last training batches again, through the model as it is now and through its dense form."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.calls.eager_code import EagerCode, inside_compiled, inside_whole_graphs
from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.calls.outermost import outermost_modules, parts_with
from prox24_lightning.calibration.hooked_module import HookedModule, share_of
from prox24_lightning.calibration.isolation.reproduction import RerunSettings
from prox24_lightning.calibration.statistics.output_error import OutputGradients
from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense
from prox24_lightning.solvers.budget.price import reason, times_or_products
from prox24_lightning.sparsify.strategies.base import Masks, RunContext
from prox24_lightning.sparsify.strategies.progressive.blocks import (
    Block,
    check_same_order,
    cut_into_blocks,
    order_of_blocks,
)
from prox24_lightning.sparsify.strategies.progressive.budget import choose_dense_layers
from prox24_lightning.sparsify.strategies.progressive.calibration import Calibration, SolveSettings
from prox24_lightning.sparsify.strategies.progressive.errors import described, on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.input_orders import choose_orders
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns
from prox24_lightning.sparsify.strategies.progressive.shared_calls import CallCutter, find_cutter
from prox24_lightning.sparsify.strategies.progressive.solve_block import solve_block
from prox24_lightning.utils.devices.cuda_graphs import GraphMemory
from prox24_lightning.utils.distributed import gathered_objects, gathered_on_first, rank
from prox24_lightning.utils.module_copy import bare_copy
from prox24_lightning.utils.tensors import map_tensors
from prox24_lightning.weights.sharded import batch_ranks, is_sharded, runnable

log = logging.getLogger(__name__)

_ORDERED_BY = 16
"""So many batches at most are recorded to see in which order the model runs."""


class RerunCalibration(Calibration):
    """Hooks the outermost modules that training calls, records their last calls, and makes them again.

    Args:
        root_is_called: whether training calls ``model`` itself, rather than parts of it.
    """

    def __init__(self, model: nn.Module, settings: SolveSettings, *, root_is_called: bool) -> None:
        super().__init__(model, settings)
        self._root_is_called = root_is_called
        self._numbers = itertools.count()
        self._graph_memory = GraphMemory()
        self._hooked: list[HookedModule] = []
        self._parts: dict[HookedModule, list[HookedModule]] = {}
        self._order: list[str] = []
        self._ordering = 0
        self._with_reference = settings.dense_target > 0
        self._gradients: dict[str, OutputGradients] = {}
        self._cutters: dict[HookedModule, CallCutter | None] = {}
        self._batches = 0
        self._whole_graphs: set[nn.Module] = set()
        self._eager = EagerCode()

    def attach(self, context: RunContext, state: dict[str, Any]) -> None:
        self.context = context
        if state:
            names = dict(self.model.named_modules())
            found = [names[name] for name in state["hooked"]]
        elif self._hooked:
            found = [hooked.module for hooked in self._hooked]
        else:
            modules = [weight.module for weight in context.weights]
            found = outermost_modules(self.model, modules, root_is_called=self._root_is_called)
        if [hooked.module for hooked in self._hooked] != found:
            self._hooked = self._hook(found)
        self.blocks = cut_into_blocks(self.model, context.weights, self._hooked)
        for index, hooked in enumerate(self._hooked if state else ()):
            hooked.load_state_dict(share_of([saved[index] for saved in state["calls"]]))
            if self._sharded:
                hooked.settings = RerunSettings()  # FSDP2 gathers parameters in hooks; a whole model may need none
            hooked.load_reference(state["reference"][index], sharded=self._sharded)
        totals = {name: found.total for name, found in self._gradients.items()}
        if state:
            totals = state["gradients"][rank() % len(state["gradients"])]
            self._ordering = state["ordering"]
            self._with_reference = state["with_reference"]
        self._gradients = {
            block.name: OutputGradients(block.name, block.module, block.feature_dim, totals[block.name])
            for block in self.blocks
            if block.name in totals
        }
        self._arrange(state.get("order", self._order))
        for hooked in self._hooked:
            hooked.attach()

    def detach(self) -> None:
        self._eager.end()
        for hooked in self._all_hooked():
            hooked.detach()
        for gradients in self._gradients.values():
            gradients.end_batch()
        self._graph_memory.release()

    def begin_batch(self, due: Collection[str], *, everything: bool) -> None:
        if self._batches:
            self._look_deeper()
        self._batches += 1
        for block in self.blocks if self.settings.gradient_weighting else ():
            if block.name in due and block.name not in self._gradients and self._reconstructs(block):
                self._gradients[block.name] = OutputGradients(block.name, block.module, block.feature_dim)
        unplaced = 0 < self._ordering <= _ORDERED_BY and len(self._order) < len(self.blocks)
        wanted = {block.hooked for block in self.blocks if block.name in due or everything or unplaced}
        for hooked in self._all_hooked():
            tried = hooked.settings is not None or hooked.problem is not None or self._sharded
            hooked.begin_batch(record=hooked in wanted, trial=not tried)
        for gradients in self._gradients.values():
            gradients.begin_batch()
        listening = [hooked.module for hooked in self._all_hooked() if hooked.listens]
        listening += [block.module for block in self.blocks if block.name in self._gradients]
        if not self._whole_graphs.isdisjoint(listening):
            self._eager.begin()

    def end_batch(self) -> None:
        self._eager.end()
        for hooked in self._all_hooked():
            hooked.end_batch()
        for gradients in self._gradients.values():
            gradients.end_batch()

    def verdict(self) -> str | None:
        """Return why the model cannot be called again; None if it can, "" if that is not known yet."""
        problems = [hooked.problem for hooked in self._hooked if hooked.problem is not None]
        if problems:
            return problems[0]
        waiting = [hooked for hooked in self._hooked if hooked.settings is None and not self._sharded]
        return "" if waiting or not all(hooked.called for hooked in self._hooked) else None

    def reference_problem(self) -> str | None:
        """Return why there can be no dense reference, None if nothing is known to be in its way. All ranks call it."""
        if not self._with_reference:
            return None
        problem = None
        if len(self._hooked) > 1:
            # Only of a single hooked module the inputs do not depend on what is pruned.
            kind = type(self._hooked[0].module).__name__
            problem = (
                f"training calls {len(self._hooked)} parts of the model ({kind}, ...) rather than one that holds all "
                "of them"
            )
        elif self._hooked and not self._sharded:
            try:
                bare_copy(self._hooked[0].module, device=torch.device("meta"))
            except Exception as error:  # of the user's classes
                problem = f"the model cannot be copied ({described(error)})"
        problem = next((found for found in gathered_objects(problem) if found), None)
        self._with_reference = problem is None
        return problem

    def begin(self) -> str | None:
        """Find the order of the blocks, choose what stays dense and the orders of inputs, and keep the dense reference;
        return why there is none after all.

        Raises:
            RerunError: if the model cannot be called again.
        """
        self._place()
        check_same_order(self.blocks)
        if self.settings.budget:
            self._spend_budget()
        if self.settings.reorder_inputs and not self._sharded:
            self._reorder_inputs()
        if not self._with_reference or not self.blocks or len(self._hooked) != 1:
            return None
        hooked, problem = self._hooked[0], None
        try:
            hooked.keep_reference(sharded=self._sharded)
            if not self._sharded:
                hooked.check_reference()
        except Exception as error:  # of the user's classes
            problem = f"the copy of the model cannot be called ({described(error)})"
        problem = next((found for found in gathered_objects(problem) if found), None)
        if problem is not None:
            hooked.reference, self._with_reference = None, False
        return problem

    def _spend_budget(self) -> None:
        prices: list[LayerPrice] = []
        times = times_or_products(self.context.weights, self.settings.layer_times)
        called = [hooked for hooked in self._hooked if all(gathered_objects(bool(hooked.calls)))]
        parts = {hooked: [block for block in self.blocks if block.hooked is hooked] for hooked in called}
        parts = {hooked: blocks for hooked, blocks in parts.items() if blocks}
        # The losses of several modules have no common unit: a price there is all that is known of a layer.
        budgets = [self.settings.budget] if len(parts) == 1 else []
        dense: frozenset[str] | None = None
        for hooked, blocks in parts.items():
            with hooked.rerunning(), self._graph_memory.shared():
                found = choose_dense_layers(
                    self.model, hooked, self._neighbours(blocks), self._shared_calls(hooked), budgets, times
                )
            prices += found.prices
            dense = found.choices[0].dense if budgets else None
        dense = choose_dense(prices, self.settings.budget) if dense is None else dense
        kept = tuple(weight for weight in self.context.weights if weight.name not in dense)
        if not kept:
            log.warning("2:4 would make no layer faster: budget=%g has no effect", self.settings.budget)
            return
        self.context.leave_dense({price.name: reason(price) for price in prices if price.name in dense})
        self.context = replace(self.context, weights=kept)
        left = cut_into_blocks(self.model, kept, self._hooked)
        for name in {block.name for block in self.blocks} - {block.name for block in left}:
            if (gradients := self._gradients.pop(name, None)) is not None:
                gradients.end_batch()
        self.blocks = left
        self._arrange([name for name in self._order if name in {block.name for block in left}])

    def _reorder_inputs(self) -> None:
        chosen = []
        for hooked in self._hooked:
            blocks = [block for block in self.blocks if block.hooked is hooked]
            if blocks and all(gathered_objects(bool(hooked.calls))):
                with hooked.rerunning(), self._graph_memory.shared():
                    chosen += choose_orders(self.model, hooked, blocks, self._shared_calls(hooked))
        # Apart from the reruns: there buffers are copies.
        self.context.move(chosen)

    def after_step(self) -> None:
        """Go on placing blocks that no recorded batch has reached yet."""
        if 0 < self._ordering < _ORDERED_BY and len(self._order) < len(self.blocks):
            self._place()

    def solve(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Masks]]:
        for hooked in dict.fromkeys(block.hooked for block in blocks):
            if hooked is not None and (left_out := hooked.leave_out_unsound()) and rank() == 0:
                log.warning(
                    "NaN or infinity in %d of the last training batches: blocks are solved without them", left_out
                )
        for together in self._neighbours(blocks):
            hooked = together[0].hooked
            assert hooked is not None
            with hooked.rerunning(), self._graph_memory.shared():
                make = partial(BlockReruns, self.model, hooked, together, self._shared_calls(hooked))
                reruns = make() if self._sharded else on_all_ranks(make)
                for block in together:
                    gradients = self._gradients.get(block.name)
                    steps = self.settings.reconstruction_steps if self._reconstructs(block) else 0
                    masks = solve_block(block, reruns, self.settings, steps, gradients, self.context.trained)
                    yield block, masks
                    if (gradients := self._gradients.pop(block.name, None)) is not None:
                        gradients.end_batch()

    def _place(self) -> None:
        self._ordering += 1
        called = [hooked for hooked in self._hooked if hooked.calls]
        with ExitStack() as stack:
            for hooked in self._hooked:
                stack.enter_context(runnable(self.model, hooked.module))

            def find() -> list[str]:
                order: list[str] = []
                for hooked in sorted(called, key=lambda one: one.calls[0].number):
                    order += order_of_blocks(hooked, [block for block in self.blocks if block.hooked is hooked])
                return order

            found = find() if self._sharded else on_all_ranks(find)
        self._arrange([*self._order, *(name for name in found if name not in self._order)])

    def _neighbours(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Neighbours in one hooked module, which share reruns of the recorded batches; of sharded models one by one."""
        groups: list[list[Block]] = []
        for block in blocks:
            last = groups[-1] if groups else []
            if last and last[-1].hooked is block.hooked and not self._sharded:
                last.append(block)
            else:
                groups.append([block])
        return groups

    def _shared_calls(self, hooked: HookedModule) -> list[ModuleCall]:
        """The calls that this rank makes again."""
        if hooked not in self._cutters:
            ranks = batch_ranks(self.model, [weight.parameter for weight in self.context.weights])
            last = [block for block in self.blocks if block.hooked is hooked][-1]
            self._cutters[hooked] = find_cutter(self.model, hooked, last, ranks)
        cut = self._cutters[hooked]
        return hooked.calls if cut is None else [cut(call) for call in hooked.calls]

    def _reconstructs(self, block: Block) -> bool:
        outside = any(weight.module is block.module for weight in block.weights)
        return self.settings.reconstruction_steps > 0 and not outside

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(weight.parameter) for weight in self.context.weights)

    def _hook(self, modules: Sequence[nn.Module]) -> list[HookedModule]:
        self._whole_graphs = inside_whole_graphs(self.model)
        compiled = inside_compiled(self.model) - self._whole_graphs
        kept = {hooked.module: hooked for hooked in self._all_hooked()}
        made = []
        for module in modules:
            hooked = kept.get(module)
            if hooked is None:
                hooked = HookedModule(module, self.settings.batches, self._numbers, compiled=module in compiled)
                if self._sharded:
                    hooked.settings = RerunSettings()
            made.append(hooked)
        return made

    def _all_hooked(self) -> list[HookedModule]:
        return [*self._hooked, *(part for parts in self._parts.values() for part in parts)]

    def _look_deeper(self) -> None:
        """Hook the parts of a module that training has not called so far; take them instead once they are called."""
        modules = [weight.module for weight in self.context.weights]
        found: list[HookedModule] = []
        for hooked in self._hooked:
            parts = self._parts.get(hooked, [])
            if hooked.called:
                for part in self._parts.pop(hooked, []):
                    part.detach()
            elif any(part.called for part in parts):
                hooked.detach()
                found += self._parts.pop(hooked)
                continue
            elif not parts and (inner := parts_with(hooked.module, modules)):
                self._parts[hooked] = self._hook(inner)
                for part in self._parts[hooked]:
                    part.attach()
            elif parts:
                self._parts[hooked] = self._deeper(parts, modules)
            found.append(hooked)
        if found != self._hooked:
            for gradients in self._gradients.values():
                gradients.end_batch()
            self._gradients.clear()
            self._hooked = found
            self.blocks = cut_into_blocks(self.model, self.context.weights, self._hooked)

    def _deeper(self, parts: list[HookedModule], modules: Sequence[nn.Module]) -> list[HookedModule]:
        """The parts of modules of which none has been called either."""
        inner: list[HookedModule] = []
        for part in parts:
            below = self._hook(parts_with(part.module, modules))
            if below:
                part.detach()
            inner += below or [part]
        for part in inner:
            part.attach()
        return inner

    def _arrange(self, order: Sequence[str]) -> None:
        place = {name: position for position, name in enumerate(order)}
        self._order = list(order)
        self.blocks.sort(key=lambda block: place.get(block.name, len(place)))

    def state_dict(self) -> dict[str, Any]:
        names = {module: name for name, module in self.model.named_modules()}
        totals = {name: found.total for name, found in self._gradients.items()}
        return {
            "order": list(self._order),
            "ordering": self._ordering,
            "with_reference": self._with_reference,
            "hooked": [names[hooked.module] for hooked in self._hooked],
            "calls": gathered_on_first([hooked.state_dict() for hooked in self._hooked]),
            "reference": [hooked.reference_state() for hooked in self._hooked],
            "gradients": gathered_on_first(map_tensors(lambda total: total.cpu(), totals)),
        }
