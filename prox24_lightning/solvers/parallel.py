"""Divide the solution of a layer over several processes; every rank ends with the whole solution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.layer import Solution, solve
from prox24_lightning.solvers.loss import check_layer
from prox24_lightning.utils.distributed import gathered_objects, joined, raise_on_all_ranks, rank, world_size
from prox24_lightning.weights.groups import Dim


def solve_on_all_ranks(
    matrix: Tensor,
    hessian: Tensor,
    config: SolverConfig,
    *,
    dim: Dim = -1,
    name: str = "layer",
    target: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Return ``solve(matrix, hessian, config)``, whose rows the ranks share out where no row depends on another.

    Work on the Hessian is shared out too, and the refinement stops by the sums of all ranks. So the result equals
    that of one process up to rounding, and that of the other ranks to the bit. Groups that span rows are solved as a
    whole by every rank.

    Args:
        matrix, hessian: the same on every rank.
        target: rows of ``matrix`` -> the weights whose outputs are to be kept; None keeps those of ``matrix``.

    Raises:
        ValueError: as ``solve`` does, on every rank.
    """
    check_layer(matrix, hessian, name)  # the same on all ranks, unlike the checks of their rows
    bounds = row_bounds(len(matrix))
    shared = world_size() > 1 and dim == -1 and len(matrix) >= world_size()
    rows = matrix[bounds[rank()] : bounds[rank() + 1]] if shared else matrix
    if target is not None:
        rows, problem = target(rows), None
        try:
            check_layer(rows, hessian, name)
        except ValueError as error:
            problem = str(error)
        raise_on_all_ranks(problem)
    if not shared:
        return solve(rows, hessian, config, dim=dim, name=name)
    solution, problem = None, None
    try:
        # What a rank may find wrong with its own rows must not keep the others waiting.
        solution = solve(rows, hessian, config, dim=dim, name=name, shared=config.method != "keep")
    except ValueError as error:
        problem = str(error)
    raise_on_all_ranks(problem)
    assert solution is not None
    return exchanged(solution, [last - first for first, last in pairwise(bounds)])


def row_bounds(count: int) -> list[int]:
    """Return where each rank's share of ``count`` things begins, and where the last one ends."""
    return [count * index // world_size() for index in range(world_size() + 1)]


def exchanged(mine: Solution, lengths: list[int]) -> Solution:
    """Return the solutions of all ranks, one below the other, on every rank.

    Args:
        mine: of this rank's ``lengths[rank()]`` rows.
        lengths: rows of each rank.
    """
    if world_size() == 1:
        return mine
    losses = [mine.zero_losses, mine.losses, mine.refined_losses, mine.rounded_losses]
    zero_losses, found, refined, rounded = (None if one is None else joined(one, lengths) for one in losses)
    assert zero_losses is not None
    assert found is not None
    gathered = gathered_objects((mine.reached, mine.seconds))
    return Solution(
        joined(mine.weight, lengths),
        joined(mine.mask, lengths),
        zero_losses,
        found,
        refined,
        sum(reached * length for (reached, _), length in zip(gathered, lengths, strict=True)) / sum(lengths),
        max(seconds for _, seconds in gathered),
        rounded,
    )
