"""Layers that share an input: their Hessian, and their solution as one stacked weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.input_groups import InputGroup, record_inputs
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.calibration.statistics.output_error import bounded_token_weights
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.layer import Solution
from prox24_lightning.solvers.loss import check_layer
from prox24_lightning.solvers.masked_cg import masked_cg
from prox24_lightning.solvers.parallel import solve_on_all_ranks
from prox24_lightning.utils.devices.cuda import without_tf32
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.groups import Dim
from prox24_lightning.weights.layer_matrix import as_matrix, from_matrix, input_rows, matrix_columns
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import gathered, local_part, part_of, whole

Run = Callable[[], Any]
"""Calls a block once, on one calibration batch."""

DenseInputs = Callable[[InputGroup, int], Sequence[Tensor]]
"""Group, number of the run -> what the first layer of the group is called with in the dense reference."""


def rerun_dense_inputs(runs: Sequence[Run], references: Mapping[nn.Module, nn.Module]) -> DenseInputs:
    """Return inputs in the dense reference that a rerun gives whenever they are asked for.

    Args:
        runs: each calls the block of the dense reference on one calibration batch.
        references: layer of the block -> the same in the dense reference.
    """
    return lambda group, number: record_inputs(references[group.layers[0]], runs[number], once=group.once)


def input_group_hessian(
    group: InputGroup,
    runs: Sequence[Run],
    dense_inputs: DenseInputs | None = None,
    *,
    attempt: Callable[[Callable[[], HessianAccumulator]], HessianAccumulator] | None = None,
    token_weights: Sequence[Mapping[nn.Module, Sequence[Tensor]]] | None = None,
    bounded: bool = False,
) -> HessianAccumulator:
    """Return the Hessian of the input that the layers of ``group`` share, over all ``runs`` on all ranks.

    Args:
        group: the layers.
        runs: each calls the block that holds the layers on one calibration batch.
        dense_inputs: of the same batches in the dense reference, for the cross products.
        attempt: makes the runs of this rank, before the ranks add up what they have found; None makes them as they are.
        token_weights: for each run what the tokens of each layer count, (tokens,) for each call; None is 1 for all.
        bounded: without ``token_weights`` tokens count by :func:`bounded_token_weights` of the layers' outputs.
    """
    layer = group.layers[0]
    made = partial(_local_hessian, group, runs, dense_inputs, token_weights, bounded)
    accumulator = made() if attempt is None else attempt(made)
    weight = layer.get_parameter("weight")
    accumulator.all_reduce(matrix_columns(layer), local_part(weight).device)
    return accumulator


def _local_hessian(
    group: InputGroup,
    runs: Sequence[Run],
    dense_inputs: DenseInputs | None,
    token_weights: Sequence[Mapping[nn.Module, Sequence[Tensor]]] | None,
    bounded: bool,
) -> HessianAccumulator:
    layer = group.layers[0]
    accumulator = HessianAccumulator()
    compared = dense_inputs is not None
    for number, run in enumerate(runs):
        between_pieces()
        rows = [input_rows(layer, gathered(x)) for x in record_inputs(layer, run, once=group.once)]
        if bounded and token_weights is None:
            weights: list[Tensor | None] = [_bounded_weights(group, part) for part in rows]
        else:
            weights = _mean_weights(group, rows, None if token_weights is None else token_weights[number])
        dense_rows: Sequence[Tensor | None] = [None] * len(rows)
        if dense_inputs is not None:
            # Also where nothing is compared any more: reruns of a sharded block make collective calls.
            found = [input_rows(layer, gathered(x)) for x in dense_inputs(group, number)]
            # A router may send other tokens here in the dense reference: its outputs there cannot be compared.
            compared = compared and [len(part) for part in rows] == [len(part) for part in found]
            dense_rows = found if compared else dense_rows
        for part, dense_part, counts in zip(rows, dense_rows, weights, strict=True):
            accumulator.add(part, dense_part, counts)
    if not compared:
        accumulator.drop_cross()
    return accumulator


def _mean_weights(
    group: InputGroup, rows: Sequence[Tensor], found: Mapping[nn.Module, Sequence[Tensor]] | None
) -> list[Tensor | None]:
    """What the tokens of a group's input count in each call: the mean over its layers; None is 1 for all."""
    if found is None:
        return [None] * len(rows)
    by_call = [torch.stack(calls).mean(0) for calls in zip(*(found[layer] for layer in group.layers), strict=True)]
    if [len(part) for part in rows] != [len(counts) for counts in by_call]:
        return [None] * len(rows)
    return list(by_call)


def _bounded_weights(group: InputGroup, rows: Tensor) -> Tensor:
    """What the tokens of a group's input count by their outputs: the mean over its layers, (tokens,)."""
    matrices = [as_matrix(layer, whole(local_part(parameter), parameter)) for layer, parameter in _parameters(group)]
    return torch.stack([bounded_token_weights(rows @ matrix.to(rows).T) for matrix in matrices]).mean(0)


def _parameters(group: InputGroup) -> list[tuple[nn.Module, Tensor]]:
    return [(layer, layer.get_parameter("weight")) for layer in group.layers]


def solve_input_group(
    weights: Sequence[GroupedWeight],
    accumulator: HessianAccumulator,
    *,
    config: SolverConfig = SolverConfig(),  # noqa: B008 (frozen)
    dense_target: float = 0.0,
) -> list[tuple[GroupedWeight, Solution]]:
    """Solve the layers of one group and write the results into them; the ranks share the rows out.

    Layers whose groups lie along the inputs are stacked: no row's result depends on another row. In the other
    geometries groups of a stacked weight would span layers, and strengths depend on the whole layer, so each layer is
    solved by itself.

    Args:
        config: of the solver.
        dense_target: 0 keeps the outputs of the present weights on the present inputs, 1 aims at the outputs that the
            layer had in the dense model, values between mix the two; needs ``C``.

    Raises:
        ValueError: as ``solve_layer`` does; nothing has been written then, except by layers solved before.
    """
    if all(weight.geometry == "row" for weight in weights):
        return _solve_stacked(weights, accumulator, config, -1, dense_target)
    return [
        solved
        for weight in weights
        for solved in _solve_stacked([weight], accumulator, config, weight.matrix_dim, dense_target)
    ]


@torch.no_grad()
@without_tf32()
def _solve_stacked(
    weights: Sequence[GroupedWeight],
    accumulator: HessianAccumulator,
    config: SolverConfig,
    dim: Dim,
    dense_target: float,
) -> list[tuple[GroupedWeight, Solution]]:
    matrices = [as_matrix(weight.module, whole(local_part(weight.parameter), weight.parameter)) for weight in weights]
    name = " + ".join(weight.module_name for weight in weights)
    dense = torch.cat(matrices)
    hessian = accumulator.hessian
    if (cross := accumulator.cross) is not None:
        check_layer(dense, cross, name)
    if any(weight.parameter.dim() != 2 for weight in weights):
        config = replace(config, weights=None)  # a packed convolution has a scale for each place of its window

    def target(rows: Tensor) -> Tensor:
        wanted = output_target(rows, accumulator, dense_target)
        if config.method == "keep" and wanted is not rows:
            return masked_cg(rows, wanted, hessian.to(rows), rows != 0, damping=config.refine_damping)
        return wanted

    solution = solve_on_all_ranks(dense, hessian, config, dim=dim, name=name, target=target)
    solved, row = [], 0
    for weight, matrix in zip(weights, matrices, strict=True):
        part = solution.rows(row, row + len(matrix))
        row += len(matrix)
        values = from_matrix(weight.module, part.weight)
        local_part(weight.parameter).copy_(part_of(values, weight.parameter))
        solved.append((weight, part))
    return solved


def output_target(weight: Tensor, accumulator: HessianAccumulator, share: float) -> Tensor:
    """Return the weight whose outputs on the pruned model's inputs come closest to the wanted ones, row by row.

    With ``X`` the inputs now and ``X_d`` those in the dense model, ``share`` = 1 solves ``min_T ||X T^T - X_d W^T||``:
    ``T = W + W (C - H) H^-1`` with ``C = X_d^T X / tokens``. Inputs that are all zero leave ``W``.
    """
    cross, hessian = accumulator.cross, accumulator.hessian.to(weight)
    if not share or cross is None or not bool(hessian.diagonal().any()):
        return weight
    shifted = hessian.clone()
    shifted.diagonal().add_(0.01 * hessian.diagonal().mean())
    change = torch.linalg.solve(shifted, (weight @ (cross.to(weight) - hessian)).T).T
    return weight + share * change
