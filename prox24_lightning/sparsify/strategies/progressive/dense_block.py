"""What a block returns and what its layers are called with in the dense reference, from one rerun of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.input_groups import InputGroup, record_all_inputs
from prox24_lightning.solvers.input_group import DenseInputs, Run, rerun_dense_inputs
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.long_work import between_pieces

_Found = tuple[list[Tensor] | None, list[dict[nn.Module, list[Tensor]]] | None]
"""The outputs of a block, and what its layers are called with in each run; None where they are not kept."""

_SHARE_KEPT = 1 / 8
"""Of a GPU's free memory that the inputs of one block's layers may take; else each input group has its own reruns."""
_KEPT_ON_CPU = 1 << 30
"""The same on a CPU, in bytes."""


@dataclass(frozen=True)
class DenseBlock:
    """A block in the dense reference.

    Attributes:
        outputs: the hidden state that it returns in each run; None where there is no reference, or that is no tensor.
        inputs: of its layers; None where there is no reference.
    """

    outputs: list[Tensor] | None = None
    inputs: DenseInputs | None = None


def run_dense_block(
    block: Block,
    groups: Sequence[InputGroup],
    runs: Sequence[Run] | None,
    counterparts: Mapping[nn.Module, nn.Module] | None,
    attempt: Callable[[Callable[[], _Found]], _Found],
) -> DenseBlock:
    """Call the block in the dense reference once on each batch; inputs are kept as far as memory allows.

    All ranks call it. They keep inputs together or not at all: reruns of a sharded block make collective calls.

    Args:
        groups: the layers of the block in the model.
        runs: of the block in the dense reference.
        counterparts: layer of the block -> the same in the dense reference.
        attempt: makes the runs of this rank.
    """
    if runs is None or counterparts is None:
        return DenseBlock()
    outputs, kept = attempt(partial(_run, block, groups, runs, counterparts))
    everywhere = all(gathered_objects(kept is not None))
    if kept is None or not everywhere:
        return DenseBlock(outputs, rerun_dense_inputs(runs, counterparts))
    inputs = kept
    return DenseBlock(outputs, lambda group, number: inputs[number][group.layers[0]])


def _run(
    block: Block, groups: Sequence[InputGroup], runs: Sequence[Run], counterparts: Mapping[nn.Module, nn.Module]
) -> _Found:
    outputs: list[Tensor] | None = []
    kept: list[dict[nn.Module, list[Tensor]]] | None = []
    held, room = 0, 0.0
    for number, run in enumerate(runs, 1):
        between_pieces()
        recorded = [counterparts[group.layers[0]] for group in groups] if kept is not None else []
        output, found = record_all_inputs(recorded, run)
        try:
            outputs = None if outputs is None else [*outputs, hidden_state(output, block.name).detach()]
        except ValueError:  # the block in the model returns no tensor either
            outputs = None
        if kept is None:
            continue
        # As in the model, whose reruns end at the first call of a layer that is called once.
        calls = {group: found[counterparts[group.layers[0]]] for group in groups}
        kept.append({group.layers[0]: made[:1] if group.once else made for group, made in calls.items()})
        tensors = [tensor for made in kept[-1].values() for tensor in made]
        room = room if number > 1 else _room(tensors)
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if held * len(runs) > room * number:  # batches differ in length
            kept = None
    return outputs, kept


def _room(tensors: Iterable[Tensor]) -> float:
    """Return how many bytes of inputs may be kept where these are."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if not devices:
        return _KEPT_ON_CPU
    cached = min(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) for device in devices)
    return _SHARE_KEPT * (cached + min(torch.cuda.mem_get_info(device)[0] for device in devices))
