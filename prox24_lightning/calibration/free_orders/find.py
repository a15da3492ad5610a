"""Find the orders of inputs that are free in a part of a model, from the way in which it computes.

Nothing about an architecture is written down. Disturbing one output of a layer shows which inputs of later layers
depend on it: exactly one (or one a query head) where only elementwise operations lie between the two, a whole head
where a query or key was disturbed, all of them behind a norm or another layer. What is found that way is proved
afterwards (:mod:`~prox24_lightning.calibration.free_orders.prove`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.free_orders.channels import (
    input_channels,
    mixes_channels,
    moved_columns,
    moved_rows,
)
from prox24_lightning.calibration.free_orders.probe import Probe
from prox24_lightning.weights.free_order import FreeOrder


@dataclass(frozen=True)
class Outputs:
    """A range of the outputs of a module: a fused projection has several."""

    module: nn.Module
    start: int
    size: int


def find_free_orders(
    region: nn.Module, run: Callable[[], Any], wanted: Iterable[nn.Module]
) -> tuple[list[FreeOrder], dict[nn.Module, str]]:
    """Return the free orders of inputs of layers inside ``region``, and why others are fixed.

    Args:
        region: the part of a model in which producers and consumers lie; computes without random numbers.
        run: calls it on one batch.
        wanted: layers whose order of inputs is of use.

    Returns:
        the orders, not proved yet, and for some of the other layers of ``wanted`` the reason; none for those whose
        inputs no layer computes alone (a residual stream behind a norm).
    """
    wanted = set(wanted)
    holders = [module for module in region.modules() if module._parameters or module._buffers]
    probe = Probe(holders, run)
    if not probe.is_deterministic:
        return [], dict.fromkeys(wanted, "two runs on equal inputs give different outputs")
    relations, widths = _relations(probe)
    found: list[FreeOrder] = []
    reasons: dict[nn.Module, str] = {}
    for consumers, outputs in _components(relations):
        if wanted.isdisjoint(consumers) or not any(mixes_channels(one.module) for one in outputs):
            continue
        try:
            found.append(_free_order(consumers, outputs, relations, widths))
        except ValueError as error:
            reasons |= {consumer: str(error) for consumer in consumers if consumer in wanted}
    return found, reasons


_Relations = dict[nn.Module, dict[Outputs, Tensor]]
"""Consumer -> outputs that reach it elementwise -> (size, copies), the inputs that each output reaches."""


def _relations(probe: Probe) -> tuple[_Relations, dict[nn.Module, int]]:
    """Return what reaches each layer elementwise, and the width of the heads that its inputs consist of, if any."""
    relations: _Relations = {reader: {} for reader in probe.readers}
    widths: dict[nn.Module, int] = {}
    place = {module: number for number, module in enumerate(probe.order)}
    # Layers first: norms and the like count only between two layers.
    for module in sorted(probe.order, key=lambda module: (not mixes_channels(module), place[module])):
        later = [reader for reader in probe.readers if place[reader] > place[module]]
        if not mixes_channels(module):
            later = [reader for reader in later if _lies_between(module, relations[reader], probe, place)]
        for outputs, maps in elementwise_readers(probe, module, later, widths):
            for reader, columns in maps.items():
                relations[reader][outputs] = columns
    return relations, widths


def elementwise_readers(
    probe: Probe, module: nn.Module, later: Sequence[nn.Module], widths: dict[nn.Module, int]
) -> Iterator[tuple[Outputs, dict[nn.Module, Tensor]]]:
    """Yield ranges of a module's outputs, and for the layers that each of these outputs reaches in inputs of its own
    the (size, copies) inputs.

    Args:
        probe: of the region.
        module: whose outputs are disturbed.
        later: the layers that may read them.
        widths: receives the width of the heads that a layer's inputs consist of, where it shows.
    """
    for outputs, readers in _ranges(module, probe.channels[module], later):
        reached = probe.reached_by(module, [outputs.start])
        maps = {}
        for reader in readers:
            inputs, hits = input_channels(reader), reached.get(reader, [])
            if (found := _pattern(hits, outputs.size, inputs)) is not None:
                maps[reader] = found
            elif hits == list(range(len(hits))) and 0 < len(hits) < inputs and inputs % len(hits) == 0:
                widths[reader] = min(len(hits), widths.get(reader, inputs))
        if not maps:
            continue
        some = torch.randperm(outputs.size, generator=torch.Generator().manual_seed(0))[: outputs.size // 2 + 1]
        reached = probe.reached_by(module, (outputs.start + some).tolist())
        sure = {reader: c for reader, c in maps.items() if reached.get(reader) == sorted(c[some].flatten().tolist())}
        if sure:
            yield outputs, sure


def _lies_between(module: nn.Module, outputs: Iterable[Outputs], probe: Probe, place: dict[nn.Module, int]) -> bool:
    return any(
        place[one.module] < place[module] and one.size == probe.channels[module]
        for one in outputs
        if mixes_channels(one.module)
    )


def _ranges(
    module: nn.Module, channels: int, readers: Sequence[nn.Module]
) -> Iterator[tuple[Outputs, list[nn.Module]]]:
    """Yield ranges of a module's outputs that may be all inputs of a layer, or a share of them, and those layers."""
    found: dict[Outputs, list[nn.Module]] = {}
    for reader in readers:
        inputs = input_channels(reader)
        parts = []
        if inputs % channels == 0:
            parts = [(0, channels)]
        elif channels % inputs == 0:
            parts = [(start, inputs) for start in range(0, channels, inputs)]
        elif channels > inputs and (channels - inputs) % 2 == 0 and inputs % ((channels - inputs) // 2) == 0:
            shared = (channels - inputs) // 2  # queries, then keys and values that several of them share
            parts = [(0, inputs), (inputs, shared), (inputs + shared, shared)]
        for start, size in parts:
            found.setdefault(Outputs(module, start, size), []).append(reader)
    yield from found.items()


def _pattern(hits: Sequence[int], size: int, inputs: int) -> Tensor | None:
    """Return (size, copies): the inputs that each output reaches, where the first one reaches ``hits``; None if those
    are no pattern of single inputs at equal distances."""
    copies = inputs // size
    if inputs % size or len(hits) != copies or hits[0] != 0:
        return None
    if copies == 1:
        return torch.arange(inputs)[:, None]
    width = hits[1]
    if size % width or list(hits) != list(range(0, copies * width, width)):
        return None
    return torch.arange(inputs).view(-1, copies, width).movedim(1, 2).flatten(0, 1)


def _components(relations: _Relations) -> Iterator[tuple[list[nn.Module], list[Outputs]]]:
    """Yield layers that are connected by outputs which reach several of them, and all those outputs."""
    left = {reader: dict.fromkeys(found) for reader, found in relations.items() if found}
    while left:
        first = next(iter(left))
        consumers, outputs = [first], left.pop(first)
        while joined := [reader for reader, found in left.items() if found.keys() & outputs.keys()]:
            for reader in joined:
                consumers.append(reader)
                outputs |= left.pop(reader)
        yield consumers, list(outputs)


def _free_order(
    consumers: Sequence[nn.Module],
    outputs: Sequence[Outputs],
    relations: _Relations,
    widths: dict[nn.Module, int],
) -> FreeOrder:
    """Raise ``ValueError`` with the reason where the order is fixed."""
    columns = next(iter(relations[consumers[0]].values()))
    for consumer in consumers:
        found = relations[consumer]
        if set(found) != set(outputs) or any(not torch.equal(one, columns) for one in found.values()):
            raise ValueError("parts of these inputs reach other layers too")
    units = len(columns)
    runs = max(columns.numel() // widths.get(consumer, columns.numel()) // columns.shape[1] for consumer in consumers)
    if units % (8 * runs):
        raise ValueError(f"{units} inputs in {runs} heads do not divide into two groups of four or more a head")
    tensors = [moved_columns(consumer, columns) for consumer in consumers]
    for one in outputs:
        tensors += moved_rows(one.module, one.start + torch.arange(one.size)[:, None])
    return FreeOrder(tuple(consumers), columns, runs, tuple(tensors))
