"""Find the scales of inputs that are free in a part of a model, from the way in which it computes.

A norm's weight scales the inputs of the layers behind it; a linear layer's rows scale those of the next one, where what
lies between is linear in each channel (values of attention, the branch of a gated unit without activation, ReLU).
Disturbing outputs shows which they may be, as for orders
(:mod:`~prox24_lightning.calibration.free_orders.find`); equal outputs under random scales prove them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.free_orders.channels import mixes_channels, moved_columns, moved_rows
from prox24_lightning.calibration.free_orders.find import Outputs, elementwise_readers
from prox24_lightning.calibration.free_orders.probe import Probe
from prox24_lightning.calibration.free_orders.prove import proved
from prox24_lightning.weights.free_order import MovedTensor
from prox24_lightning.weights.free_scale import FreeScale


def proved_scales(
    region: nn.Module,
    run: Callable[[], Any],
    wanted: Iterable[nn.Module],
    *,
    fixed: Callable[[Tensor], str | None] = lambda tensor: None,
    guesses: Sequence[FreeScale] = (),
) -> tuple[list[FreeScale], dict[nn.Module, str]]:
    """Return free scales of the inputs of ``wanted``, proved by equal outputs, and why the inputs of others are fixed.

    Args:
        region: the part of a model in which producers and consumers lie; computes without random numbers.
        run: calls it on one batch.
        wanted: layers whose inputs are to be scaled; each is in at most one scale.
        fixed: says why a tensor may not change (shared with another module, say); None if it may.
        guesses: scales of this region that hold in one like it: proved first, which spares most of the search.
    """
    wanted = list(dict.fromkeys(wanted))
    holders = [module for module in region.modules() if module._parameters or module._buffers]
    probe = Probe(holders, run)
    if not probe.is_deterministic:
        return [], dict.fromkeys(wanted, "two runs on equal inputs give different outputs")
    if any(mixes_channels(module) for module in probe.uncalled):
        # It may read what is scaled on another batch, as experts do that no token of this one goes to.
        return [], dict.fromkeys(wanted, "layers beside it are not called on every batch")
    allowed = [scale for scale in guesses if all(fixed(part.tensor) is None for part in scale.tensors)]
    found = proved(allowed, run)[0] if allowed else []
    reasons: dict[nn.Module, str] = {}
    taken = {consumer for scale in found for consumer in scale.consumers}
    left = set(wanted) - taken
    if not left:
        return found, {}
    # The nearest producer first: between it and the layer lies least.
    for candidate in _candidates(probe):
        consumers = set(candidate.consumers)
        if consumers.isdisjoint(left) or consumers & taken:
            continue
        problem = next((why for part in candidate.tensors if (why := fixed(part.tensor)) is not None), None)
        if problem is not None:
            reasons |= dict.fromkeys(consumers, problem)
            continue
        good, refuted = proved([candidate], run)
        reasons |= refuted
        if good:
            found += good
            left -= consumers
            taken |= consumers
    return found, {layer: reasons.get(layer, "nothing scales its inputs alone") for layer in wanted if layer in left}


def _candidates(probe: Probe) -> Iterator[FreeScale]:
    """Yield what may be a free scale, the last producer of the run first."""
    place = {module: number for number, module in enumerate(probe.order)}
    for module in reversed(probe.order):
        if "weight" not in module._parameters:
            continue
        later = [reader for reader in probe.readers if place[reader] > place[module]]
        for outputs, maps in elementwise_readers(probe, module, later, {}):
            columns = next(iter(maps.values()))
            if any(not torch.equal(one, columns) for one in maps.values()):
                continue
            try:
                divided = tuple(_rows(outputs))
            except ValueError:
                continue
            yield FreeScale(tuple(maps), columns, tuple(moved_columns(one, columns) for one in maps), divided)


def _rows(outputs: Outputs) -> Iterator[MovedTensor]:
    """Yield weight and bias of a producer, not its statistics: it is linear in those two alone."""
    places = outputs.start + torch.arange(outputs.size)[:, None]
    for part in moved_rows(outputs.module, places):
        if part.name in ("weight", "bias"):
            yield part
