"""Experts whose weights are one 3-D parameter: each expert's matrix solved on the inputs of its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.expert_inputs import expert_inputs_of
from prox24_lightning.calibration.statistics.expert_hessians import ExpertHessians
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.layer import Solution, solve
from prox24_lightning.solvers.parallel import exchanged, row_bounds
from prox24_lightning.utils.distributed import gathered_objects, raise_on_all_ranks, rank
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.weights.experts import expert_matrices, from_expert_matrices
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part, part_of, whole

HESSIAN_BYTES = 2**31
"""Memory for Hessians: so many experts are solved at a time, and the calibration inputs run once for each such part."""


@dataclass(frozen=True)
class SolvedExperts:
    """A 3-D parameter whose experts are 2:4.

    Attributes:
        weight: which parameter; its values are written.
        mask: bool, of its shape; of a sharded parameter this rank's part.
        solution: of all experts' matrices, one below the other; losses count by each expert's share of the tokens.
        tokens: of each expert. One without a token keeps its largest weights.
    """

    weight: GroupedWeight
    mask: Tensor
    solution: Solution
    tokens: tuple[int, ...]

    @property
    def note(self) -> str:
        """What the reader of a report should know; empty if every expert saw as many tokens as it has inputs."""
        unseen = sum(count == 0 for count in self.tokens)
        few = sum(0 < count < self.solution.weight.shape[1] for count in self.tokens)
        notes = [f"{unseen} of {len(self.tokens)} experts saw no token: mask by magnitude"] if unseen else []
        return "; ".join(notes + ([f"{few} experts saw fewer tokens than they have inputs"] if few else []))


@torch.no_grad()
def solve_experts(
    weights: Sequence[GroupedWeight],
    runs: Sequence[Callable[[], Any]],
    *,
    config: SolverConfig = SolverConfig(),  # noqa: B008 (frozen)
) -> Iterator[SolvedExperts]:
    """Make the 3-D parameters of one module of experts 2:4, in the order in which the experts use them.

    Each is solved on what it sees after those before it have been pruned. The outputs of the present weights are kept:
    a router of the dense model sends other tokens, so there is nothing to compare with.

    Args:
        weights: of one module.
        runs: each calls the model, or the block that holds the module, on one calibration batch.
        config: of the solver.

    Yields:
        one entry for each weight whose products were seen, as soon as it is solved; the others are as they were.

    Raises:
        ValueError: as ``solve_layer`` does, by name; the parameter it is about is as it was.
    """
    module = weights[0].module
    by_name = {weight.parameter_name: weight for weight in weights}
    order = _order_of_use(module, runs, set(by_name))
    for name in order:
        yield _solve(by_name[name], runs, config)


def _order_of_use(module: nn.Module, runs: Sequence[Callable[[], Any]], names: set[str]) -> list[str]:
    order: list[str] = []
    for run in runs:
        for found in expert_inputs_of(module, run):
            order += [name for name in found if name in names and name not in order]
        if len(order) == len(names):
            break
    together = gathered_objects(order)
    return max(together, key=len)


def _solve(weight: GroupedWeight, runs: Sequence[Callable[[], Any]], config: SolverConfig) -> SolvedExperts:
    count, columns = len(weight.parameter), weight.parameter.shape[weight.input_dim]
    at_once = max(1, HESSIAN_BYTES // (4 * columns**2))

    def hessians() -> Iterator[ExpertHessians]:
        for first in range(0, count, at_once):
            found = ExpertHessians(range(first, min(first + at_once, count)))
            for run in runs:
                between_pieces()
                for inputs in expert_inputs_of(weight.module, run):
                    found.add(inputs.get(weight.parameter_name, {}))
            found.all_reduce(columns, local_part(weight.parameter).device)
            yield found

    return _solve_parts(weight, hessians(), config)


@torch.no_grad()
def solve_expert_weight(weight: GroupedWeight, hessians: ExpertHessians, *, config: SolverConfig) -> SolvedExperts:
    """Make one 3-D parameter 2:4, given the Hessians of all its experts' inputs, and write it.

    Raises:
        ValueError: as ``solve`` does, by name; nothing has been written then.
    """
    return _solve_parts(weight, [hessians], config)


def _solve_parts(weight: GroupedWeight, hessians: Iterable[ExpertHessians], config: SolverConfig) -> SolvedExperts:
    """Solve the experts part by part; Hessians of one part are freed before those of the next are made.

    The ranks share the experts of a part out.
    """
    matrices = expert_matrices(whole(local_part(weight.parameter), weight.parameter), weight.input_dim)
    parts: list[Solution] = []
    tokens: list[int] = []
    for some in hessians:
        tokens += [hessian.tokens for hessian in some.by_expert.values()]
        parts.append(_solve_shared_out(weight, matrices, some, config))
    joined = _weighted(Solution.joined(parts), tokens)
    solution = replace(joined, seconds=sum(part.seconds for part in parts))
    values, mask = (
        from_expert_matrices(flat.view_as(matrices), weight.input_dim) for flat in (solution.weight, solution.mask)
    )
    local_part(weight.parameter).copy_(part_of(values, weight.parameter))
    return SolvedExperts(weight, part_of(mask, weight.parameter), solution, tuple(tokens))


def _solve_shared_out(
    weight: GroupedWeight, matrices: Tensor, hessians: ExpertHessians, config: SolverConfig
) -> Solution:
    """Return the solutions of all experts that have a Hessian, one below the other: each rank solves some of them."""
    experts = list(hessians.by_expert)
    bounds = row_bounds(len(experts))
    mine, problem = [], None
    try:
        for expert in experts[bounds[rank()] : bounds[rank() + 1]]:
            mine.append(_solve_one(weight, matrices[expert], hessians.by_expert[expert], expert, config))
    except ValueError as error:
        problem = str(error)
    raise_on_all_ranks(problem)
    rows = [(last - first) * matrices.shape[1] for first, last in pairwise(bounds)]
    together = Solution.joined(mine) if mine else _nothing(matrices, config)
    return exchanged(replace(together, seconds=sum(solution.seconds for solution in mine)), rows)


def _nothing(matrices: Tensor, config: SolverConfig) -> Solution:
    """Return what a rank without experts hands to the others."""
    empty = matrices[0, :0].to(torch.float64 if matrices.dtype == torch.float64 else torch.float32)
    losses = empty.new_empty(0)
    refined, rounded = (losses if wanted is not None else None for wanted in (config.refine, config.weights))
    return Solution(empty, empty.bool(), losses, losses, refined, 0.0, 0.0, rounded)


def _solve_one(
    weight: GroupedWeight, matrix: Tensor, inputs: HessianAccumulator, expert: int, config: SolverConfig
) -> Solution:
    if inputs.tokens:
        hessian = inputs.hessian
    else:
        hessian, config = torch.eye(matrix.shape[1], device=matrix.device), replace(config, method="magnitude")
    return solve(matrix, hessian, config, dim=weight.matrix_dim, name=f"{weight.name}[{expert}]")


def _weighted(solution: Solution, tokens: Sequence[int]) -> Solution:
    """Return the solution of all experts with losses that count by the share of the tokens which each expert has."""
    shares = torch.tensor(tokens, dtype=solution.losses.dtype, device=solution.losses.device) / max(1, sum(tokens))
    shares = shares.repeat_interleave(len(solution.losses) // len(tokens))
    refined, rounded = solution.refined_losses, solution.rounded_losses
    return replace(
        solution,
        zero_losses=solution.zero_losses * shares,
        losses=solution.losses * shares,
        refined_losses=None if refined is None else refined * shares,
        rounded_losses=None if rounded is None else rounded * shares,
    )
