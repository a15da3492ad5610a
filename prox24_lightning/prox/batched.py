"""The exact 2:4 proximal operator in batched torch operations, for any device and dtype.

Memory is bounded by working on chunks of groups. On CPU only the groups that need it are solved: cheap tests
settle the class of most groups, and the rest is gathered. On other devices gathering would wait for the device to say
how many there are, so every group of a chunk is solved and the answer selected: more arithmetic, no wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prox24_lightning.groups import group_shape, resolve_group_dim
from prox24_lightning.prox.roots import dense, dense_at_zero, three_sparse

CHUNK = 1 << 16
"""Groups a chunk on CPU: the working set stays in the last-level cache, and one operation is long enough to split over
threads."""

ALWAYS_TWO = (1 + 2**0.5) / 2
"""In lambda units: a group whose largest entry is this large or larger keeps its two largest entries, unchanged."""


def prox_24_batched(
    weight: Tensor, strength: float | Tensor, *, dim: int = -1, scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """As :func:`prox24_lightning.prox.prox_24`, which checks the arguments first."""
    weight = weight.detach()
    if out is None:
        out = torch.empty_like(weight)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dim = resolve_group_dim(weight.shape, dim)
    shape = group_shape(weight.shape, dim)
    lam = torch.as_tensor(strength, dtype=compute, device=weight.device).expand(shape)
    source, target = quarters(weight, dim), quarters(out.detach(), dim)
    scales = None if scale is None else quarters(scale.detach().to(compute).expand(weight.shape), dim)
    for part in chunks(shape, chunk_size(weight)):
        where = (slice(None), *part)
        y = source[where].to(compute)
        piece = y.shape
        y = y.reshape(4, -1)
        s = None if scales is None else scales[where].reshape(4, -1)
        result = _prox_chunk(y, lam[part].reshape(-1), s, compact=weight.device.type == "cpu")
        target[where].copy_(result.view(piece))
    return out


def chunk_size(weight: Tensor) -> int:
    """Groups a chunk: at most 1/64 of the weight off the CPU, as about 60 float32 values a group are alive at once."""
    if weight.device.type == "cpu":
        return min(CHUNK, max(1024, weight.numel() // 32))
    return max(CHUNK, weight.numel() // 128)


def chunks(shape: Sequence[int], size: int) -> Iterator[tuple[int | slice, ...]]:
    """Index tuples that cut a tensor of ``shape`` into pieces of about ``size`` entries, in memory order."""
    if not shape:
        yield ()
        return
    rest = 1
    for length in shape[1:]:
        rest *= length
    if rest <= size:
        step = max(1, size // max(1, rest))
        for begin in range(0, shape[0], step):
            yield (slice(begin, begin + step),)
    else:
        for index in range(shape[0]):
            for inner in chunks(shape[1:], size):
                yield (index, *inner)


def quarters(tensor: Tensor, dim: int) -> Tensor:
    """View as ``(4, *group_shape)``: the first, second, third and fourth entries of all groups."""
    return tensor.unflatten(dim, (tensor.shape[dim] // 4, 4)).movedim(dim + 1, 0)


def _prox_chunk(weight: Tensor, lam: Tensor, scale: Tensor | None, *, compact: bool) -> Tensor:
    """The prox of ``weight`` (4, groups), contiguous, in the dtype of the computation."""
    magnitude = weight.abs()
    y = magnitude if scale is None else magnitude * scale
    e2, bad = _shifts(y, lam, compact=compact)
    rank = _ranks(y)
    shrink = torch.where(rank == 0, e2[0], torch.where(rank == 1, e2[1], torch.where(rank == 2, e2[2], e2[3])))
    if scale is not None:
        shrink = shrink / scale
    kept = (magnitude - shrink).clamp_min_(0.0)
    kept = torch.where(shrink == torch.inf, 0.0, kept)  # also inf - inf
    result = torch.copysign(kept, weight) + 0.0
    return result.masked_fill_(bad, torch.nan)


def _ranks(y: Tensor) -> Tensor:
    """Rank of each entry in its group, 0 for the largest; among equals the earlier position is the larger."""
    later_wins = {(i, j): (y[j] > y[i]).view(torch.uint8) for i in range(4) for j in range(i + 1, 4)}
    ranks = []
    for i in range(4):
        beaten = [later_wins[i, j] for j in range(i + 1, 4)] + [1 - later_wins[j, i] for j in range(i)]
        ranks.append(beaten[0] + beaten[1] + beaten[2])
    return torch.stack(ranks)


def sort_four(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four entries of each group, largest first."""
    high, low = torch.maximum(y[:2], y[2:]), torch.minimum(y[:2], y[2:])
    middle_high, middle_low = torch.minimum(high[0], high[1]), torch.maximum(low[0], low[1])
    return (
        torch.maximum(high[0], high[1]),
        torch.maximum(middle_high, middle_low),
        torch.minimum(middle_high, middle_low),
        torch.minimum(low[0], low[1]),
    )


def _shifts(y: Tensor, lam: Tensor, *, compact: bool) -> tuple[Tensor, Tensor]:
    """By how much each of the sorted entries shrinks, infinity for those that are pruned; and which groups are NaN."""
    y1, y2, y3, y4 = sort_four(y)
    bad = ~((y1 >= 0) & (lam >= 0))
    # 0 * inf counts as 0: strength 0 leaves an infinite entry alone, an infinite strength leaves a zero alone.
    v1, v2, v3, v4 = torch.stack([y1, y2, y3, y4]).mul_(lam).nan_to_num_(nan=0.0, posinf=torch.inf)
    square = v1 * v1 + v2 * v2
    # Each is sufficient for 2-sparse; the last is also necessary where square <= 1. lam multiplies one factor
    # only, so that nothing underflows.
    two = (v1 >= ALWAYS_TWO) | (square >= 1 + (4 / 3) * v3 * v3)
    two |= y3 * ((square + 1) / 2).clamp_min_(1.0) <= v1 * y2
    keep_all = lam == 0
    two &= ~keep_all
    shifts = torch.zeros_like(y)
    shifts[2:] = torch.inf
    if not compact:
        solved = _solve(y1, y2, y3, y4, v1, v2, v3, v4, lam)
        return torch.where(two, shifts, torch.where(keep_all, 0.0, solved)), bad
    shifts.masked_fill_(keep_all, 0.0)
    index = (~(two | keep_all)).nonzero().squeeze(1)
    if index.numel():
        picked = torch.stack([y1, y2, y3, y4, v1, v2, v3, v4, lam])[:, index]
        shifts[:, index] = _solve(*picked)
    return shifts, bad


def _solve(
    y1: Tensor, y2: Tensor, y3: Tensor, y4: Tensor, v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, lam: Tensor
) -> Tensor:
    """Shifts of sorted groups that the cheap tests left open."""
    w1, w2, w3, gain3 = three_sparse(v1, v2, v3)
    # The cheap tests were exact for v1^2 + v2^2 <= 1.
    beats = (gain3 < 0) | (v1 * v1 + v2 * v2 <= 1)
    p1, p2, p3, p4, gain4 = dense(v1, v2, v3, v4)
    certain = (y4 > 0) & (y4 >= v1 * y2 + v2 * y3 + v3 * y1)
    convex = v1 + v2 + v3 <= 1
    exists = dense_at_zero(v1, v2, v3, v4) < 0
    all_four = certain | (beats & torch.where(convex, exists, (p4 > 0) & (gain4 < 0) & (gain4 < gain3)))
    w1, w2, w3 = torch.where(all_four, p1, w1), torch.where(all_four, p2, w2), torch.where(all_four, p3, w3)
    w4 = torch.where(all_four, p4, 0.0)
    three = beats | all_four
    pair = w3 + w4
    product = w3 * w4
    lam = lam.clamp_min(torch.finfo(lam.dtype).tiny)
    none = torch.zeros_like(w1)
    e1 = torch.where(three, (w2 * pair + product) / lam, none)
    e2 = torch.where(three, (w1 * pair + product) / lam, none)
    e3 = torch.where(three, (w1 * w2 + (w1 + w2) * w4) / lam, torch.inf)
    e4 = torch.where(all_four, (w1 * w2 + (w1 + w2) * w3) / lam, torch.inf)
    return torch.stack([e1, e2, e3, e4])
