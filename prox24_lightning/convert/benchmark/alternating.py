"""Time variants of one model that differ in some layers, in turn within every round.

A machine that slows down for some seconds then slows all variants alike, and cannot pass for a gain or a loss of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from prox24_lightning.convert.measurement import Call, Timing, release_memory, time_calls
from prox24_lightning.convert.module_slots import exchange, slots_by_name
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.errors import describe

_Call = TypeVar("_Call", bound=Call)


class LayerSets:
    """Sets of layers for one model, of which one is in the model at a time.

    Args:
        model: changed in place; its other layers are shared by all variants.
        sets: name of the variant -> (module name -> layer), for the same modules in each.
    """

    def __init__(self, model: nn.Module, sets: Mapping[str, Mapping[str, nn.Module]]) -> None:
        self.model = model
        self._sets = sets
        slots = slots_by_name(model)
        self._slots = {name: slots[name] for layers in sets.values() for name in layers}

    def use(self, variant: str) -> None:
        """Put the layers of a variant into the model."""
        for name, layer in self._sets[variant].items():
            exchange(self._slots[name], layer)


@dataclass(frozen=True)
class CallTimes:
    """Times of a variant: eager, and from a CUDA graph or, if it cannot be captured, why."""

    eager: Timing
    graph: Timing | None
    graph_problem: str | None


def time_alternating(calls: Mapping[str, Call], use: Callable[[str], None], rounds: int) -> dict[str, CallTimes]:
    """Time the variants in turn, first called eagerly and then replayed from CUDA graphs.

    Args:
        calls: name of a variant -> the call to time, with the variant in use.
        use: makes a variant the one in use; its own time does not count.
        rounds: at least 2; each times every variant once.
    """
    eager = time_calls(calls, rounds=rounds, prepare=use)
    replays: dict[str, Call] = {}
    problems: dict[str, str] = {}
    for name, call in calls.items():
        use(name)
        try:
            replays[name] = capture(call).replay
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # whatever a model does on the host can end the capture
            problems[name] = describe(failure)
    graphs = time_calls(replays, rounds=rounds)
    return {name: CallTimes(eager[name], graphs.get(name), problems.get(name)) for name in calls}


def peak_bytes(model: nn.Module, make: Callable[[], _Call]) -> tuple[_Call, int]:
    """Return the call that ``make`` makes, and the peak GPU memory of making and running it, the model included.

    What else is in memory, like the layers of other variants, is not counted.
    """
    release_memory()
    others = torch.cuda.memory_allocated() - module_bytes(model)
    torch.cuda.reset_peak_memory_stats()
    call = make()
    call()
    torch.cuda.synchronize()
    return call, torch.cuda.max_memory_allocated() - others


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})
