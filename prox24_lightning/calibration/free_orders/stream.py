"""Find the order of the residual stream, which all blocks of a model share, from the way in which it computes.

What is added to the stream and what reads it lies in different blocks, so disturbing one output does not show that two
layers belong together: behind the first attention everything depends on everything. It shows the pieces: an embedding
reaches the norm behind it channel by channel, a norm the layers that it feeds, a layer the norm behind its sum. All
pieces of the stream's width that hold a norm or an embedding are taken together and proved by equal outputs; where that
fails, single pieces (a norm of all queries, say) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import Blocks
from prox24_lightning.calibration.free_orders.channels import (
    input_channels,
    mixes_channels,
    moved_columns,
    moved_rows,
    takes_any_order,
)
from prox24_lightning.calibration.free_orders.probe import Probe
from prox24_lightning.calibration.free_orders.prove import why_not_proved
from prox24_lightning.weights.free_order import FreeOrder, MovedTensor

_LEFT_OUT = 2
"""So many pieces at most are left out where all together are not free."""


@dataclass(frozen=True)
class _End:
    """The outputs of a module, or its inputs; of a norm, which ``reads``, both: they have one order."""

    module: nn.Module
    reads: bool


def find_stream_order(
    model: nn.Module, blocks: Blocks, width: int, run: Callable[[], Any], holders: Mapping[Tensor, int]
) -> FreeOrder:
    """Return the order of the residual stream, proved by equal outputs of the model.

    Args:
        model: computes without random numbers.
        blocks: of the model, which hand the stream on.
        width: of the stream.
        run: calls the model on one batch and returns its outputs.
        holders: parameter -> in how many places of the model it is.

    Raises:
        ValueError: with the reason, where it is not free.
    """
    if width % 8:
        raise ValueError(f"its {width} channels do not divide into two groups of four or more")
    samples = _samples(blocks)
    inside = {module for block in blocks.modules for module in block.modules()}
    probed = [module for index in samples for module in blocks.modules[index].modules()]
    behind = [m for i in samples if i + 1 < len(blocks) for m in blocks.modules[i + 1].modules()]
    outside = [module for module in model.modules() if module not in inside]
    candidates = [m for m in dict.fromkeys([*outside, *probed, *behind]) if m._parameters or m._buffers]
    probe = Probe(candidates, run, reads=lambda module: takes_any_order(module) or _is_norm(module, width))
    if not probe.is_deterministic:
        raise ValueError("two runs on equal inputs give different outputs")
    pieces = _joined([*_everywhere(piece, blocks)] for piece in _pieces(probe, width, {*outside, *probed}))
    if not pieces:
        raise ValueError("no norm or embedding shows its channels")
    problem = ""
    for left_out in range(min(_LEFT_OUT, len(pieces) - 1) + 1):
        for kept in combinations(pieces, len(pieces) - left_out):
            ends = dict.fromkeys(end for piece in kept for end in piece)
            try:
                order = _order(model, ends, width, holders)
            except ValueError as error:
                problem = problem or str(error)
                continue
            if (found := why_not_proved([order], run)) is None:
                return order
            problem = problem or f"another order of it changes {found}"
    raise ValueError(problem)


def _samples(blocks: Blocks) -> list[int]:
    """Return the first block of each kind, others having modules of the same names, types and sizes; and the last,
    which hands the stream on to the head."""
    kinds: dict[Any, int] = {}
    for index, block in enumerate(blocks.modules):
        kinds.setdefault(_kind(block), index)
    return sorted({*kinds.values(), len(blocks) - 1})


def _kind(block: nn.Module) -> Any:
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(value.shape)) for name, value in block.named_parameters())


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether ``module`` holds a number for each channel of the stream and nothing else, as norms do."""
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    is_leaf = next(module.children(), None) is None
    return is_leaf and bool(tensors) and all(tuple(tensor.shape) == (width,) for tensor in tensors)


def _pieces(probe: Probe, width: int, disturbed: set[nn.Module]) -> list[list[_End]]:
    """Return what one order holds together channel by channel, where a norm or an embedding is part of it."""
    pieces: list[list[_End]] = []
    some = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: width // 2 + 1].sort().values.tolist()
    for module in probe.order:
        if module not in disturbed or probe.channels[module] != width:
            continue
        first = probe.reached_by(module, [0])
        readers = [reader for reader, hits in first.items() if hits == [0] and reader is not module]
        readers = [reader for reader in readers if not mixes_channels(reader) or input_channels(reader) == width]
        if not readers:
            continue
        again = probe.reached_by(module, some)
        ends = [_End(module, _is_norm(module, width))]
        ends += [_End(reader, True) for reader in readers if again.get(reader) == some]
        pieces.append(ends)
    joined = _joined(pieces)
    return [one for one in joined if len(one) > 1 and any(not mixes_channels(end.module) for end in one)]


def _joined(pieces: Iterable[list[_End]]) -> list[list[_End]]:
    """Return the pieces, those with an end in common as one."""
    found: list[list[_End]] = []
    for piece in pieces:
        alike = [one for one in found if not set(one).isdisjoint(piece)]
        found = [one for one in found if one not in alike]
        found.append(list(dict.fromkeys([end for one in [*alike, piece] for end in one])))
    return found


def _everywhere(piece: Sequence[_End], blocks: Blocks) -> Iterator[_End]:
    """Yield the ends of a piece, and those of the same names in all blocks of the same kind."""
    kinds = [_kind(block) for block in blocks.modules]
    for end in piece:
        yield end
        for index, block in enumerate(blocks.modules):
            name = next((name for name, module in block.named_modules() if module is end.module), None)
            if name is not None:
                alike = (other for other, kind in zip(blocks.modules, kinds, strict=True) if kind == kinds[index])
                yield from (replace(end, module=other.get_submodule(name)) for other in alike)


def _order(model: nn.Module, ends: Mapping[_End, None], width: int, holders: Mapping[Tensor, int]) -> FreeOrder:
    channels = torch.arange(width)[:, None]
    consumers = [end.module for end in ends if end.reads and mixes_channels(end.module)]
    moved: list[MovedTensor] = [moved_columns(consumer, channels) for consumer in consumers]
    for end in ends:
        if isinstance(end.module, nn.Embedding):
            moved.append(MovedTensor(end.module, "weight", 1, channels))
        elif mixes_channels(end.module) != end.reads:
            moved += moved_rows(end.module, channels)
    # Positions and tokens that a model holds itself, or a block beside its layers.
    for module in model.modules():
        if next(module.children(), None) is not None:
            for name, own in module._parameters.items():
                if own is not None and own.dim() and own.shape[-1] == width:
                    moved.append(MovedTensor(module, name, own.dim() - 1, channels))
    # Tied weights move once; a layer that reads the stream and adds to it moves along both dimensions.
    places: dict[tuple[Tensor, int], list[MovedTensor]] = {}
    for part in moved:
        places.setdefault((part.tensor, part.dim), []).append(part)
    for (tensor, _), parts in places.items():
        if isinstance(tensor, nn.Parameter) and holders.get(tensor, 1) != len(
            {(part.module, part.name) for part in parts}
        ):
            label = f"{type(parts[0].module).__name__}.{parts[0].name}"
            raise ValueError(f"{label} is shared with what keeps its order")
    return FreeOrder(tuple(consumers), channels, 1, tuple(parts[0] for parts in places.values()))
