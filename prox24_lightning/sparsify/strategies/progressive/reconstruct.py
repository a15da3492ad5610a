"""Reconstruct a solved block: collect what the solver of it needs from masks, calls and gradients."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.isolation.gathered_module import gathered_module, gathering_dtype
from prox24_lightning.calibration.isolation.reproduction import check_same, rounding_tolerance
from prox24_lightning.calibration.statistics.output_error import OutputGradients
from prox24_lightning.solvers.block_reconstruction import reconstruct_block
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.errors import on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockRun
from prox24_lightning.utils.distributed import world_size
from prox24_lightning.utils.tensors import map_tensors
from prox24_lightning.weights.sharded import gathered, is_sharded, whole

log = logging.getLogger(__name__)


def reconstruct(
    block: Block,
    runs: Sequence[BlockRun],
    targets: Sequence[Tensor],
    found: Mapping[str, Tensor],
    steps: int,
    gradients: OutputGradients | None,
    trained: Collection[Tensor],
) -> None:
    """Refine the parameters of ``block`` together; what keeps it from that is named in a warning. All ranks call it.

    A block with sharded parameters is gathered for it, and each rank keeps its parts of the result.

    Args:
        runs: its calls.
        targets: what it is to return in each of them.
        found: the masks of its weights that have been solved; of a sharded weight this rank's part.
        steps: gradient steps.
        gradients: what its output's features count by; None is the same for all.
        trained: parameters that training changes; others stay as they are.
    """
    masks: dict[Tensor, Tensor] = {
        w.parameter: whole(found[w.name], w.parameter) for w in block.weights if w.name in found
    }
    try:
        if any(map(is_sharded, block.module.parameters())):
            before, after = _gathered(block, runs, targets, masks, steps, gradients, trained)
        else:
            before, after = _reconstruct(block, runs, targets, masks, steps, gradients, trained)
    except Exception as error:  # of the user's forward under gradients
        log.warning("%s is not reconstructed: %s", block.name, error)
        return
    log.info("%s: relative error of the output %.5f, %.5f after reconstruction", block.name, before, after)


def _gathered(
    block: Block,
    runs: Sequence[BlockRun],
    targets: Sequence[Tensor],
    masks: Mapping[Tensor, Tensor],
    steps: int,
    gradients: OutputGradients | None,
    trained: Collection[Tensor],
) -> tuple[float, float]:
    """Reconstruct the block with whole parameters, once it is known to compute with them what it does sharded."""
    dtype = gathering_dtype(block.module)
    expected = gathered(hidden_state(runs[0](), block.name))
    calls = [_plain(run, dtype) for run in runs]
    tolerance = rounding_tolerance(block.module, calls[0].call)
    targets = [gathered(target) for target in targets]
    parameters = list(block.module.parameters())
    with gathered_module(block.module) as held:

        def check() -> None:
            output = hidden_state(calls[0](), block.name)
            check_same(expected, output, tolerance, problem="computes otherwise with whole weights")

        on_all_ranks(check)
        masks = {held.get(parameter, parameter): mask for parameter, mask in masks.items()}
        trained = {held.get(parameter, parameter) for parameter in parameters if parameter in trained}
        return _reconstruct(block, calls, targets, masks, steps, gradients, trained)


def _plain(run: BlockRun, dtype: torch.dtype | None) -> BlockRun:
    """Return the call with whole tensors, under autocast where FSDP2 casts parameters."""
    call = run.call
    args, kwargs = map_tensors(gathered, (call.args, call.kwargs))
    call = replace(call, args=args, kwargs=kwargs, autocast=call.autocast or dtype)
    return replace(run, call=call, model=run.module)  # of the model around it nothing is gathered


def _reconstruct(
    block: Block,
    runs: Sequence[BlockRun],
    targets: Sequence[Tensor],
    solved: Mapping[Tensor, Tensor],
    steps: int,
    gradients: OutputGradients | None,
    trained: Collection[Tensor],
) -> tuple[float, float]:
    parameters = {name: parameter for name, parameter in block.module.named_parameters() if parameter in trained}
    dim = block.feature_dim(targets[0])
    targets = [target.movedim(dim, -1) for target in targets]
    masks = {name: solved[parameter] for name, parameter in parameters.items() if parameter in solved}
    # A matrix that was not solved here keeps its zeros: another Prox24 may have frozen it.
    masks |= {n: p.detach() != 0 for n, p in parameters.items() if n not in masks and p.dim() >= 2}

    def forward(arguments: tuple[Any, ...]) -> Tensor:
        return hidden_state(runs[0].with_arguments(arguments)(), block.name).movedim(dim, -1)

    batches = [run.arguments() for run in runs]
    weights = None
    if gradients is not None:
        sizes = {target.shape[-1] for target in targets}
        weights = gradients.weights(sizes.pop(), targets[0].device) if len(sizes) == 1 else None
    with torch.compiler.set_stance("default"):  # what training compiled of the block serves here
        on_all_ranks(partial(_check_gradients, forward, batches[0], list(parameters.values())))
        return reconstruct_block(
            block.module,
            masks,
            forward,
            batches,
            targets,
            steps=steps,
            trained=trained,
            feature_weights=weights,
            graphed=all(run.call.random is None for run in runs),
        )


def _check_gradients(forward: Any, arguments: tuple[Any, ...], parameters: Sequence[nn.Parameter]) -> None:
    """Fail where a reconstruction would, before the ranks wait for each other in it."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() > 1 and trained:
        with torch.enable_grad():
            torch.autograd.grad(forward(arguments).float().sum(), trained, allow_unused=True)
