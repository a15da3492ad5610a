"""Experts whose weights are one 3-D parameter: each expert's matrix solved on the inputs of its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.experts.hessians import ExpertHessians
from prox24_lightning.calibration.experts.inputs import expert_inputs_of
from prox24_lightning.calibration.hessian import HessianAccumulator
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.layer import Solution, solve
from prox24_lightning.solvers.parallel import solve_rows_in_parallel
from prox24_lightning.utils.distributed import gathered_objects
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
    by_rows: bool = False,
) -> Iterator[SolvedExperts]:
    """Make the 3-D parameters of one module of experts 2:4, in the order in which the experts use them.

    Each is solved on what it sees after those before it have been pruned. The outputs of the present weights are kept:
    a router of the dense model sends other tokens, so there is nothing to compare with.

    Args:
        weights: of one module.
        runs: each calls the model, or the block that holds the module, on one calibration batch.
        config: of the solver.
        by_rows: every rank solves a part of the rows.

    Yields:
        one entry for each weight whose products were seen, as soon as it is solved; the others are as they were.

    Raises:
        ValueError: as ``solve_layer`` does, by name; the parameter it is about is as it was.
    """
    module = weights[0].module
    by_name = {weight.parameter_name: weight for weight in weights}
    order = _order_of_use(module, runs, set(by_name))
    for name in order:
        yield _solve(by_name[name], runs, config, by_rows)


def _order_of_use(module: nn.Module, runs: Sequence[Callable[[], Any]], names: set[str]) -> list[str]:
    order: list[str] = []
    for run in runs:
        for found in expert_inputs_of(module, run):
            order += [name for name in found if name in names and name not in order]
        if len(order) == len(names):
            break
    together = gathered_objects(order)
    return max(together, key=len)


def _solve(
    weight: GroupedWeight, runs: Sequence[Callable[[], Any]], config: SolverConfig, by_rows: bool
) -> SolvedExperts:
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

    return _solve_parts(weight, hessians(), config, by_rows)


@torch.no_grad()
def solve_expert_weight(weight: GroupedWeight, hessians: ExpertHessians, *, config: SolverConfig) -> SolvedExperts:
    """Make one 3-D parameter 2:4, given the Hessians of all its experts' inputs, and write it.

    Raises:
        ValueError: as ``solve`` does, by name; nothing has been written then.
    """
    return _solve_parts(weight, [hessians], config, by_rows=False)


def _solve_parts(
    weight: GroupedWeight, hessians: Iterable[ExpertHessians], config: SolverConfig, by_rows: bool
) -> SolvedExperts:
    """Solve the experts part by part; Hessians of one part are freed before those of the next are made."""
    matrices = expert_matrices(whole(local_part(weight.parameter), weight.parameter), weight.input_dim)
    parts: list[Solution] = []
    tokens: list[int] = []
    for some in hessians:
        for expert, hessian in some.by_expert.items():
            tokens.append(hessian.tokens)
            parts.append(_solve_one(weight, matrices[expert], hessian, expert, config, by_rows))
    shares = [count / max(1, sum(tokens)) for count in tokens]
    joined = Solution.joined([_weighted(part, share) for part, share in zip(parts, shares, strict=True)])
    solution = replace(joined, seconds=sum(part.seconds for part in parts))
    values, mask = (
        from_expert_matrices(flat.view_as(matrices), weight.input_dim) for flat in (solution.weight, solution.mask)
    )
    local_part(weight.parameter).copy_(part_of(values, weight.parameter))
    return SolvedExperts(weight, part_of(mask, weight.parameter), solution, tuple(tokens))


def _solve_one(
    weight: GroupedWeight,
    matrix: Tensor,
    inputs: HessianAccumulator,
    expert: int,
    config: SolverConfig,
    by_rows: bool,
) -> Solution:
    name = f"{weight.name}[{expert}]"
    if inputs.tokens:
        hessian = inputs.hessian
    else:
        hessian, config = torch.eye(matrix.shape[1], device=matrix.device), replace(config, method="magnitude")

    def solve_rows(rows: Tensor) -> Solution:
        return solve(rows, hessian, config, dim=weight.matrix_dim, name=name)

    return solve_rows_in_parallel(matrix, solve_rows) if by_rows and weight.matrix_dim == -1 else solve_rows(matrix)


def _weighted(solution: Solution, share: float) -> Solution:
    refined, rounded = solution.refined_losses, solution.rounded_losses
    return replace(
        solution,
        zero_losses=solution.zero_losses * share,
        losses=solution.losses * share,
        refined_losses=None if refined is None else refined * share,
        rounded_losses=None if rounded is None else rounded * share,
    )
