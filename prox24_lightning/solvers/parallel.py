"""Solve the rows of a layer over several processes; every rank ends with the whole solution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prox24_lightning.solvers.layer import Solution
from prox24_lightning.utils.distributed import gathered_objects, rank, world_size


def solve_rows_in_parallel(matrix: Tensor, solve: Callable[[Tensor], Solution]) -> Solution:
    """Return ``solve(matrix)``, of which every rank solves a block of rows; rows must not depend on each other.

    Rounding and the refinement's stopping rule apply to a block instead of the whole, so the result equals that of one
    process up to these, and that of the other ranks to the bit.

    Raises:
        ValueError: on every rank, if ``solve`` raises it on one.
    """
    if world_size() == 1:
        return solve(matrix)
    bounds = [len(matrix) * index // world_size() for index in range(world_size() + 1)]
    first, last = bounds[rank()], bounds[rank() + 1]
    mine, problem = None, None
    try:
        mine = solve(matrix[first:last]).to("cpu") if last > first else None
    except ValueError as error:
        problem = str(error)
    found = gathered_objects((mine, problem))
    if problems := [text for _, text in found if text is not None]:
        raise ValueError(problems[0])
    return Solution.joined([part for part, _ in found if part is not None]).to(matrix.device)
