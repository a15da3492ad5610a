"""Solve one block: its layers one after the other, then all of it together by the error of its output."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.calibration.statistics.output_error import OutputGradients, token_importance
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.experts import solve_experts
from prox24_lightning.solvers.input_group import Run, input_group_hessian, solve_input_group
from prox24_lightning.sparsify.strategies.base import Masks
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.calibration import SolveSettings
from prox24_lightning.sparsify.strategies.progressive.dense_block import run_dense_block
from prox24_lightning.sparsify.strategies.progressive.errors import direct, on_all_ranks
from prox24_lightning.sparsify.strategies.progressive.reconstruct import reconstruct
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns, BlockRun, mixed, outputs_of
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.layer_matrix import from_matrix, why_not_solvable
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import is_sharded, part_of

log = logging.getLogger(__name__)


def solve_block(
    block: Block,
    reruns: BlockReruns,
    settings: SolveSettings,
    reconstruction_steps: int,
    gradients: OutputGradients | None,
    trained: Collection[Tensor],
) -> Masks:
    """Solve the layers of ``block`` that the solver can take: write their values into the model, return their masks.

    Args:
        reruns: of the block and its neighbours; the next of them sees this one as it is now.
        settings: how it is solved.
        reconstruction_steps: gradient steps on the whole block; 0 leaves them out.
        gradients: what its output's features count by; None is the same for all.
        trained: parameters that training changes; reconstruction leaves others alone.

    Raises:
        RerunError: if the block cannot be called again; its layers may be half solved.
    """
    solvable = [w for w in block.weights if why_not_solvable(w.module, w.parameter_name) is None]
    owners = {weight.module: weight for weight in solvable if not weight.is_experts}
    experts = {weight.module: [w for w in solvable if w.module is weight.module] for weight in solvable}
    experts = {module: weights for module, weights in experts.items() if module not in owners}
    # Reruns of a sharded model make collective calls of their own.
    attempt = direct if any(is_sharded(weight.parameter) for weight in block.weights) else on_all_ranks
    found: Masks = {}
    runs = attempt(lambda: _calls(block, reruns))
    if not all(gathered_objects(bool(runs))):
        if solvable:
            log.warning(
                "%s was not called in the calibration batches; its largest weights are kept instead (or add it to "
                "skip)",
                block.name,
            )
        return found
    dense_runs, counterparts = attempt(lambda: reruns.dense_runs_of(block))
    groups = attempt(lambda: find_input_groups([*owners, *experts], runs[0]))
    alone = [group for group in groups if group.layers[0] in owners]
    dense = run_dense_block(block, alone, dense_runs, counterparts, attempt)
    targets = None
    if solvable and reconstruction_steps:
        targets = attempt(partial(_targets, block, runs, dense.outputs, settings.dense_target))
    counted = None
    if settings.token_weighting and attempt is on_all_ranks:
        layers = [layer for group in groups for layer in group.layers if layer in owners]
        counted = _token_weights(block, layers, runs, gradients, settings.token_weighting)
    for group in groups:
        if group.layers[0] in experts:
            between_pieces(experts[group.layers[0]][0].module_name)
            found |= _solve_experts(experts[group.layers[0]], runs, settings.solver(group.layers[0]))
            continue
        members = [owners[layer] for layer in group.layers]
        between_pieces(" + ".join(weight.module_name for weight in members))
        hessian = input_group_hessian(group, runs, dense.inputs, attempt=attempt, token_weights=counted)
        try:
            config = settings.solver(group.layers[0])
            solved = solve_input_group(members, hessian, config=config, dense_target=settings.dense_target)
        except ValueError as error:
            log.warning("%s; its largest weights are kept instead", error)
            continue
        for weight, solution in solved:
            found[weight.name] = part_of(from_matrix(weight.module, solution.mask), weight.parameter)
    if targets is not None and found:
        between_pieces(f"{block.name} as a whole")
        dense = replace(dense, inputs=None)  # reconstruction takes memory of its own
        reconstruct(block, runs, targets, found, reconstruction_steps, gradients, trained)
    attempt(lambda: reruns.pass_on(block, runs, dense_runs, dense.outputs))
    return found


def _calls(block: Block, reruns: BlockReruns) -> list[BlockRun]:
    """The calls of the block, with random states only where it draws random numbers."""
    runs = reruns.runs_of(block)
    if runs and not runs[0].draws():
        runs = [replace(run, call=replace(run.call, random=None)) for run in runs]
    return runs


def _targets(
    block: Block, runs: Sequence[Run], dense_outputs: Sequence[Tensor] | None, dense_target: float
) -> list[Tensor] | None:
    """What the block is to return in each run; None where that is no tensor."""
    try:
        return mixed(outputs_of(block, runs), dense_outputs, dense_target)
    except ValueError as error:
        log.warning("%s is not reconstructed: %s", block.name, error)
        return None


def _token_weights(
    block: Block,
    layers: Sequence[nn.Module],
    runs: Sequence[BlockRun],
    gradients: OutputGradients | None,
    share: float,
) -> list[dict[nn.Module, list[Tensor]]] | None:
    """What each token counts in the Hessians of ``layers``, for each run; None, with a warning, where that fails."""

    def output_of(run: BlockRun) -> Tensor:
        output = hidden_state(run.with_arguments(run.arguments())(), block.name)
        return output.movedim(block.feature_dim(output), -1)

    found = []
    try:
        for run in runs:
            between_pieces()
            counted = token_importance(layers, partial(output_of, run), gradients)
            found.append({layer: [one.mul(share).add(1 - share) for one in calls] for layer, calls in counted.items()})
    except Exception as error:  # of the user's forward under gradients
        log.warning("%s: every token counts the same in its Hessians: %s", block.name, error)
        return None
    return found


def _solve_experts(weights: Sequence[GroupedWeight], runs: Sequence[BlockRun], config: SolverConfig) -> Masks:
    found: Masks = {}
    try:
        for solved in solve_experts(weights, runs, config=config):
            found[solved.weight.name] = solved.mask
    except Exception as error:  # of the experts' forward, which is the user's
        log.warning("%s: %s", weights[0].module_name, error)
    for weight in weights:
        if weight.name not in found:
            log.warning("%s: its experts' inputs are not seen; their largest weights are kept instead", weight.name)
    return found
