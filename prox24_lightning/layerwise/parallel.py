"""A layer-wise run over several processes: each counts its own batches and solves its own rows; all end with the same.

Without a process group every function does what one process needs, which is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from prox24_lightning.layerwise.solve import Solution
from prox24_lightning.layerwise.stages import Stage
from prox24_lightning.ranks import gathered_objects, rank, world_size


def check_same_stages(stages: Sequence[Stage], names: Mapping[nn.Module, str]) -> None:
    """Refuse ranks whose batches take different ways through a block: they would wait for each other for ever.

    Raises:
        ValueError: on every rank.
    """
    orders = gathered_objects([[names[layer] for layer in stage.layers] for stage in stages])
    if any(order != orders[0] for order in orders):
        raise ValueError(
            f"the ranks' first batches run the layers of a block in different orders (rank 0: {orders[0][:4]}...); "
            "prune in one process, or leave these layers dense with skip="
        )


def solved_by_rows(matrix: Tensor, solve: Callable[[Tensor], Solution]) -> Solution:
    """``solve(matrix)`` where every rank solves a block of rows, which must not depend on each other.

    Rounding and the refinement's stopping rule see a block instead of the whole, so the result is that of one process
    up to these, and that of the other ranks to the bit.

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
