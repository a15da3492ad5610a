"""Divide recorded batches over the ranks: each makes its calls with a part of what it has recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.calls.inner_calls import inner_calls
from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.calibration.isolation.reproduction import check_same, rounding_tolerance
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.tensors import map_tensors, tensors_in
from prox24_lightning.weights.sharded import local_part, runnable

POSITIONS = 8192
"""So many positions (tokens, or places of an image) a batch has at least after the cut, over all ranks together."""


@dataclass(frozen=True)
class CallCutter:
    """Cuts a call to this rank's share of its samples: what one rank's batch holds, all ranks call together.

    Attributes:
        ranks: how many have batches of their own.
        positions: of a hidden state, for each entry of a call's first tensor.
    """

    ranks: int
    positions: float

    def __call__(self, call: ModuleCall) -> ModuleCall:
        """Return the call with the first samples of every tensor that has one entry for each sample."""
        first = _first(call)
        if first is None:
            return call
        samples, positions = len(first), self.positions * first.numel()
        kept = max(samples / self.ranks, samples * POSITIONS / (self.ranks * max(1.0, positions)))
        count = min(samples, math.ceil(kept))

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.dim() or len(tensor) != samples:
                return tensor
            return tensor.detach()[:count].requires_grad_(tensor.requires_grad)

        args, kwargs = map_tensors(cut, (call.args, call.kwargs))
        return replace(call, args=args, kwargs=kwargs)


def find_cutter(model: nn.Module, hooked: HookedModule, block: Block, ranks: int) -> CallCutter | None:
    """Return how the calls of ``hooked`` are cut; None where a part of a batch does not give a part of the outputs.

    That is tried on one call, up to the output of ``block``, within :meth:`HookedModule.rerunning`. All ranks call it.

    Args:
        model: what holds the hooked module.
        block: the last one that the calls reach.
        ranks: how many have batches of their own.
    """
    calls = hooked.calls[:1]
    divisible = bool(calls) and calls[0].random is None and _first(calls[0]) is not None
    if ranks == 1 or not all(gathered_objects(divisible)):
        return None
    found: CallCutter | None = None
    try:
        trial = CallCutter(ranks, math.inf)(calls[0])
        with runnable(model, hooked.module):
            whole, part = inner_calls(hooked.module, [block.module], [calls[0], trial])[block.module].calls
        with runnable(model, block.module):
            outputs = [hidden_state(call(block.module), block.name) for call in (whole, part)]
        expected, output = (local_part(one) for one in outputs)
        check_same(expected[: len(output)], output, rounding_tolerance(hooked.module, calls[0]))
        positions = expected.numel() / expected.shape[block.feature_dim(expected)]
        first = _first(calls[0])
        found = CallCutter(ranks, positions / first.numel()) if first is not None else None
    except Exception:  # of the user's forward, or other values: whole batches are as good, and slower
        found = None
    return found if all(gathered_objects(found is not None)) else None


def _first(call: ModuleCall) -> Tensor | None:
    """Return the call's first tensor, which tells the number of its samples; None if they cannot be divided."""
    tensors: Sequence[Tensor] = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.dim()]
    strided = all(tensor.layout is torch.strided and not tensor.is_nested for tensor in tensors)
    return tensors[0] if tensors and strided and len(tensors[0]) > 1 else None
