"""What a block returns and what its layers are called with in the dense reference, from one rerun of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.input_groups import InputGroup, record_all_inputs
from prox24_lightning.solvers.input_group import DenseInputs, Run, rerun_dense_inputs
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.utils.long_work import between_pieces

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
) -> DenseBlock:
    """Call the block in the dense reference once on each batch; inputs are kept as far as memory allows.

    Args:
        groups: the layers of the block in the model.
        runs: of the block in the dense reference.
        counterparts: layer of the block -> the same in the dense reference.
    """
    if runs is None or counterparts is None:
        return DenseBlock()
    layers = {group.layers[0]: counterparts[group.layers[0]] for group in groups}
    outputs: list[Tensor] | None = []
    kept: list[dict[nn.Module, list[Tensor]]] | None = []
    for run in runs:
        between_pieces()
        output, found = record_all_inputs(list(layers.values()) if kept is not None else [], run)
        try:
            outputs = None if outputs is None else [*outputs, hidden_state(output, block.name).detach()]
        except ValueError:  # the block in the model returns no tensor either
            outputs = None
        if kept is None or not (kept or _fits(found, len(runs))):
            kept = None
            continue
        kept.append({layer: found[counterpart] for layer, counterpart in layers.items()})
    if kept is None:
        return DenseBlock(outputs, rerun_dense_inputs(runs, counterparts))
    inputs = kept
    return DenseBlock(outputs, lambda group, number: inputs[number][group.layers[0]])


def _fits(found: Mapping[nn.Module, Sequence[Tensor]], runs: int) -> bool:
    """Whether as many inputs as these may be kept of each run."""
    tensors = [tensor for calls in found.values() for tensor in calls]
    needed = runs * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if not devices:
        return needed <= _KEPT_ON_CPU
    cached = min(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) for device in devices)
    return needed <= _SHARE_KEPT * (cached + min(torch.cuda.mem_get_info(device)[0] for device in devices))
