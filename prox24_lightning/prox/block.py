"""The prox of the block geometry: 4 x 4 blocks that become 2:4 along rows and columns at once.

    argmin_W 1/2 ||W - Y||^2 + strength * (sum of r over the 4 rows + sum of r over the 4 columns)

has no closed form. It is split into row and column prox steps, each of them exact
(:func:`~prox24_lightning.prox.prox_24`, so that the fused kernels run where they can), and finished by descent:

- *splitting*: Dykstra's alternation, or the averaged (parallel) form of it. Both converge to the minimiser for convex
  penalties; this one is not convex, so they are a good start and no more.
- *descent*: with all rows but one fixed, the column penalties are linear in that row, ``strength * e2(the other three
  of the column)`` an entry; so the best row is ``prox_24(max(|Y| - strength * e2, 0), strength)``, exactly. Sweeping
  over rows and columns never raises the objective.
- *guard*: a block whose objective is not below that of its exact projection (onto at most two in every row and column)
  becomes the projection. So no block ends worse than projecting straight away, and from some strength on every block
  is its projection, with survivors bit for bit those of ``Y``. The projection is onto *at most* two: for 10 % of
  Gaussian blocks a mask of seven entries keeps more than each of the 90 masks of eight.

Entries are worked on as magnitudes (signs come back at the end), laid out as (4, 4, blocks) so that every operation
runs along contiguous memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from prox24_lightning.mask.transposable import best_patterns, relative_squares
from prox24_lightning.prox.penalty import penalty_24
from prox24_lightning.weights.blocks_4x4 import BLOCK_DIMS, from_blocks, per_block, to_blocks
from prox24_lightning.weights.groups import group_dims

BlockMethod = Literal["dykstra", "averaged", "descent"]

Prox = Callable[..., Tensor]
"""``prox(values, strength, dim=)``, the row prox that the splitting calls."""

CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}
"""Blocks worked on at a time by device type: about a dozen copies of 16 values each are alive."""


@dataclass(frozen=True)
class BlockTrace:
    """Convergence of a splitting: one value a step, over all blocks.

    Attributes:
        objective: mean objective of a block.
        change: root mean square of what the step changed, over that of the weight.
        disagreement: root mean square of the difference between the row and the column iterate, over that of the
            weight.
    """

    objective: list[float]
    change: list[float]
    disagreement: list[float]


def check_method(method: str, steps: int, sweeps: int) -> None:
    """Refuse bad arguments.

    Raises:
        ValueError: for an unknown method, or numbers of steps that do nothing.
    """
    if method not in get_args(BlockMethod):
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(get_args(BlockMethod))}")
    if steps < 1 or sweeps < 0:
        raise ValueError(f"steps={steps} must be at least 1 and sweeps={sweeps} at least 0")


def prox_blocks(
    weight: Tensor,
    strength: Tensor,
    prox: Prox,
    *,
    dims: tuple[int, int] = BLOCK_DIMS,
    scale: Tensor | None = None,
    method: BlockMethod = "dykstra",
    steps: int = 5,
    sweeps: int = 2,
) -> Tensor:
    """As :func:`prox24_lightning.prox.prox_block`, which checks the arguments and passes the row prox."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    first, second = group_dims(weight.shape, dims)
    source = to_blocks(weight.detach(), (first, second))
    factor = None if scale is None else to_blocks(scale.detach().expand(weight.shape), (first, second)).to(compute)
    strength = per_block(strength.detach().to(weight.device, compute), weight.shape, (first, second))
    result = torch.empty(source.shape, dtype=weight.dtype, device=weight.device)
    size = CHUNK.get(weight.device.type, CHUNK["cuda"])
    for begin in range(0, source.shape[2], size):
        part = slice(begin, begin + size)
        given = source[:, :, part].to(compute)
        scaled = given if factor is None else given * factor[:, :, part]
        y = scaled.abs().contiguous()
        best = solve_blocks(y, strength[part], prox, method=method, steps=steps, sweeps=sweeps)
        found = torch.copysign(best, scaled) if factor is None else torch.copysign(best, scaled) / factor[:, :, part]
        # Untouched entries stay bit for bit; pruned ones are +0.
        found = torch.where(best == y, given, torch.where(best == 0, 0.0, found))
        result[:, :, part] = found.to(weight.dtype)
    return from_blocks(result, weight.shape, (first, second))


def solve_blocks(
    y: Tensor, strength: Tensor, prox: Prox, *, method: BlockMethod = "dykstra", steps: int = 5, sweeps: int = 2
) -> Tensor:
    """Return the guarded result for magnitudes ``y`` (4, 4, blocks) and ``strength`` (blocks,): same shape as ``y``."""
    finite = strength.clamp_max(torch.finfo(y.dtype).max)
    found = y
    if method != "descent":
        found = deque(splitting(y, finite, prox, method, steps), maxlen=1)[0][0]
    found = descend(found.abs(), y, finite, prox, sweeps)
    projected = y * best_patterns(relative_squares(y), at_most=True)
    better = block_objective(found, y, finite) < block_objective(projected, y, finite)
    best = torch.where(better | (strength == 0), torch.where(strength == 0, y, found), projected)
    return torch.where(torch.isnan(y).any(0).any(0) | ~(strength >= 0), torch.nan, best)


def splitting(
    y: Tensor, strength: Tensor, prox: Prox, method: BlockMethod, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the iterate of each step, and the results of its row prox and column prox; all (4, 4, blocks)."""
    if method == "dykstra":
        x, rows_rest, columns_rest = y, torch.zeros_like(y), torch.zeros_like(y)
        for _ in range(steps):
            rows_rest = x + rows_rest
            rows = prox(rows_rest, strength, dim=1)
            rows_rest = rows_rest - rows
            columns_rest = rows + columns_rest
            x = prox(columns_rest, strength, dim=0)
            columns_rest = columns_rest - x
            yield x, rows, x
        return
    # The sum of the two penalties is the mean of twice each.
    for_rows, for_columns = y, y
    for _ in range(steps):
        rows, columns = prox(for_rows, 2 * strength, dim=1), prox(for_columns, 2 * strength, dim=0)
        x = (rows + columns) / 2
        for_rows, for_columns = for_rows + x - rows, for_columns + x - columns
        yield x, rows, columns


def descend(w: Tensor, y: Tensor, strength: Tensor, prox: Prox, sweeps: int) -> Tensor:
    """Minimise exactly over one row, then one column, of every block at a time: never raises the objective."""
    w = w.clone()
    for _ in range(sweeps):
        for rows in (True, False):
            for index in range(4):
                line = w[index] if rows else w[:, index]
                others = [w[i] if rows else w[:, i] for i in range(4) if i != index]
                a, b, c = others
                price = torch.addcmul(a * b, a + b, c)  # e2 of the other three entries of each crossing line
                wanted = torch.addcmul(y[index] if rows else y[:, index], price, strength, value=-1)
                line.copy_(prox(wanted.clamp_min_(0).contiguous(), strength, dim=0))
    return w


def block_objective(w: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """Return ``1/2 ||w - y||^2 + strength * penalty`` of every block, in float64: (blocks,)."""
    w, y = w.double(), y.double()
    penalty = penalty_24(w, dim=0, reduce="none").sum((0, 1)) + penalty_24(w, dim=1, reduce="none").sum((0, 1))
    return 0.5 * (w - y).square().sum((0, 1)) + strength.double() * penalty


def trace_blocks(y: Tensor, strength: Tensor, prox: Prox, method: BlockMethod, steps: int) -> BlockTrace:
    """Record how the splitting of magnitudes ``y`` (4, 4, blocks) converges, before descent and guard. Waits for the
    device."""
    trace = BlockTrace([], [], [])
    size, last = y.square().mean().sqrt().clamp_min(torch.finfo(y.dtype).tiny), y
    for x, rows, columns in splitting(y, strength, prox, method, steps):
        trace.objective.append(float(block_objective(x.abs(), y, strength).mean()))
        trace.change.append(float((x - last).square().mean().sqrt() / size))
        trace.disagreement.append(float((rows - columns).square().mean().sqrt() / size))
        last = x
    return trace
