"""The exact 2:4 proximal operator in batched torch operations, for any device and dtype.

Memory is bounded by working on chunks of groups. On CPU only the groups that need it are solved: cheap tests
settle most groups, and the rest is gathered. On other devices gathering would wait for the device to count
them, so every group of a chunk is solved and the answer selected: more arithmetic, no wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from prox24_lightning.prox.roots import CAP, dense, indicator, three_sparse
from prox24_lightning.weights.groups import chunks, group_shape, quarters, resolve_group_dim

CHUNK = 1 << 16
"""Groups a chunk on CPU: the working set stays in the last-level cache, and one operation is long enough to split over
threads."""

SMALLEST = 1 << 14
"""Groups a chunk at least: with fewer, the calls cost more than the arithmetic. Its working set is 3 MB."""

ALWAYS_TWO = (1 + 2**0.5) / 2
"""In lambda units: a group whose largest entry is this large or larger keeps its two largest entries, unchanged."""

WORTHWHILE = 0.6
"""Gathering groups and scattering their answers pays only below this share of all."""


def prox_24_batched(
    weight: Tensor,
    strength: float | Tensor,
    *,
    dim: int = -1,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """As :func:`prox24_lightning.prox.prox_24`, which checks the arguments first; ``chunk`` groups at a time, or
    :func:`chunk_size`."""
    if weight.device.type == "cpu":
        keep_freed_memory()
    weight = weight.detach()
    out = torch.empty_like(weight) if out is None else out
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dim = resolve_group_dim(weight.shape, dim)
    shape = group_shape(weight.shape, dim)
    if not isinstance(strength, Tensor):
        strength = torch.full((), strength, dtype=compute, device=weight.device)  # a fill: no wait for the device
    strength = strength.detach().to(weight.device, compute)
    strength = strength.reshape(()) if strength.numel() == 1 else strength.expand(shape)
    source, target = quarters(weight, dim), quarters(out.detach(), dim)
    scales = None if scale is None else quarters(scale.detach().to(compute).expand(weight.shape), dim)
    for part in chunks(shape, chunk or chunk_size(weight)):
        where = (slice(None), *part)
        view = source[where].to(compute)
        piece = view.shape
        # Not clone(): a copy that turns (groups, 4) into (4, groups) takes three times as long as arithmetic that does.
        signed = torch.mul(view, 1.0, out=torch.empty(piece, dtype=compute, device=weight.device)).view(4, -1)
        strength_here = strength if strength.dim() == 0 else strength[part].reshape(-1)
        scale_here = None if scales is None else scales[where].reshape(4, -1)
        result = _prox_chunk(signed, strength_here, scale_here, compact=weight.device.type == "cpu")
        target[where].copy_(result.view(piece))
    return out


def chunk_size(weight: Tensor) -> int:
    """Return the number of groups of a chunk.

    Some 40 values of the computing dtype are alive for each, so a chunk is a share of all groups: a small one on CPU,
    where chunks should fit the cache; a larger one elsewhere, as every operation is a launch.
    """
    on_cpu = weight.device.type == "cpu"
    share = weight.numel() // (64 if on_cpu else 16) // (4 if weight.element_size() < 4 else 1)
    return min(CHUNK, max(SMALLEST, share)) if on_cpu else max(CHUNK, share)


def sort_four(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four entries (first dimension) of each group, largest first. A NaN spreads to all four."""
    high, low = torch.maximum(y[:2], y[2:]), torch.minimum(y[:2], y[2:])
    middle_high, middle_low = torch.minimum(high[0], high[1]), torch.maximum(low[0], low[1])
    return (
        torch.maximum(high[0], high[1]),
        torch.maximum(middle_high, middle_low),
        torch.minimum(middle_high, middle_low),
        torch.minimum(low[0], low[1]),
    )


@cache
def keep_freed_memory() -> None:
    """Let the C library keep freed blocks instead of returning them to the system; once a process.

    glibc maps every block above 128 kB afresh until a larger one has been freed, and the page faults
    of that cost more than the arithmetic. Freeing one block of 16 MB, never touched, moves the threshold.
    """
    torch.empty(1 << 24, dtype=torch.uint8)


def _prox_chunk(weight: Tensor, strength: Tensor, scale: Tensor | None, *, compact: bool) -> Tensor:
    """The prox of ``weight`` (4, groups), contiguous; ``strength`` is (groups,) or 0-dim, ``scale`` like ``weight``."""
    magnitude = weight.abs()
    y = magnitude if scale is None else magnitude * scale
    if compact and not bool(y.amax().isfinite()):
        # The few groups with an infinity or a NaN go the way that allows for them.
        at = (~y.isfinite()).any(dim=0).nonzero().squeeze(1)
        strength_at = strength if strength.dim() == 0 else strength.index_select(0, at)
        scale_at = None if scale is None else scale.index_select(1, at)
        special = _prox_chunk(weight.index_select(1, at), strength_at, scale_at, compact=False)
        result = _prox_chunk(weight.index_fill(1, at, 0.0), strength, scale, compact=True)
        _put(result, at, special)
        return result
    if compact:
        shrink = _shrink_compact(y, strength)
    else:
        ordered = sort_four(y)
        shrink = _by_rank(y, _shrink_sorted(ordered, strength, compact=False))
        magnitude = torch.where(shrink == _pruned(y), 0.0, magnitude)  # an infinite entry would survive the subtraction
        broken = ~((ordered[0] >= 0) & (strength >= 0))
        if scale is not None:
            broken |= ~((scale > 0) & (scale < torch.inf)).all(dim=0)
        shrink = shrink.masked_fill_(broken, torch.nan)
    if scale is not None:
        shrink = shrink.div_(scale)
    return magnitude.sub_(shrink).clamp_min_(0.0).copysign_(weight).add_(0.0)


def _pruned(y: Tensor) -> float:
    """How much a pruned entry "shrinks": a finite number, since 0 * inf would spoil selections by multiplication."""
    return torch.finfo(y.dtype).max


def _capped(y: Tensor, strength: Tensor) -> Tensor:
    """``strength * y`` with 0 * inf = 0: strength 0 leaves an infinite entry alone, an infinite one leaves a zero."""
    return (y * strength).nan_to_num_(nan=0.0, posinf=CAP).clamp_max_(CAP)


def _shrink_compact(y: Tensor, strength: Tensor) -> Tensor:
    """How much each entry of ``y`` (4, groups) shrinks: solve only the groups that the cheap tests leave open."""
    ordered = sort_four(y)
    y1, y2, y3, _ = ordered
    v1, v2, v3 = _capped(y1, strength), _capped(y2, strength), _capped(y3, strength)
    # Each test is sufficient for two entries; the last one is also necessary where v1^2 + v2^2 <= 1.
    square = torch.addcmul(v1 * v1, v2, v2)
    two = indicator(torch.ge, v1, ALWAYS_TWO)
    two = torch.maximum(two, indicator(torch.ge, square, v3.square_().mul_(4 / 3).add_(1)))
    least = square.add_(1).mul_(0.5).clamp_min_(1.0).mul_(y3)
    two = torch.maximum(two, indicator(torch.le, least, v1.mul_(y2)))
    settled = int(two.sum())
    if settled < (1 - WORTHWHILE) * two.numel():
        return _by_value(y, ordered, strength)
    shrink = indicator(torch.lt, y, y2).mul_(_pruned(y))
    tie = indicator(torch.eq, y2, y3).mul_(two).mul_(y3)
    if bool(tie.any()):
        at = tie.nonzero().squeeze(1)
        _put(shrink, at, (_ranks(y.index_select(1, at)) >= 2).to(y.dtype).mul_(_pruned(y)))
    if settled < two.numel():
        index = (two == 0).nonzero().squeeze(1)
        some = y.index_select(1, index)
        strength = strength if strength.dim() == 0 else strength.index_select(0, index)
        _put(shrink, index, _by_value(some, sort_four(some), strength))
    return shrink


def _by_value(y: Tensor, ordered: tuple[Tensor, ...], strength: Tensor) -> Tensor:
    """Shrinkage in the order of ``y``, by comparing each entry with the sorted ones; where one of two equals is pruned,
    by rank."""
    y1, y2, y3, y4 = ordered
    s1, s2, s3, s4 = _shrink_sorted(ordered, strength, compact=True)
    step2, step3, step4 = s2 - s1, s3 - s2, s4 - s3
    shrink = indicator(torch.lt, y, y1).mul_(step2).add_(s1)
    shrink.addcmul_(indicator(torch.lt, y, y2), step3).addcmul_(indicator(torch.lt, y, y3), step4)
    tie = indicator(torch.eq, y2, y3).mul_(step3).addcmul_(indicator(torch.eq, y3, y4), step4).mul_(y3)
    if bool(tie.any()):
        at = tie.nonzero().squeeze(1)
        _put(shrink, at, _by_rank(y.index_select(1, at), [s.index_select(0, at) for s in (s1, s2, s3, s4)]))
    return shrink


def _by_rank(y: Tensor, shrink: Sequence[Tensor]) -> Tensor:
    """Bring sorted ``shrink`` into the order of ``y``; among equals the earlier position is the larger."""
    rank = _ranks(y)
    s1, s2, s3, s4 = shrink
    return torch.where(rank == 0, s1, torch.where(rank == 1, s2, torch.where(rank == 2, s3, s4)))


def _ranks(y: Tensor) -> Tensor:
    """Rank of each entry in its group, 0 for the largest; among equals the earlier position is the larger."""
    later_wins = {(i, j): (y[j] > y[i]).view(torch.uint8) for i in range(4) for j in range(i + 1, 4)}
    ranks = []
    for i in range(4):
        beaten = [later_wins[i, j] for j in range(i + 1, 4)] + [1 - later_wins[j, i] for j in range(i)]
        ranks.append(beaten[0] + beaten[1] + beaten[2])
    return torch.stack(ranks)


def _put(rows: Tensor | Sequence[Tensor], index: Tensor, values: Tensor | Sequence[Tensor]) -> None:
    for row, value in zip(rows, values, strict=True):
        row.scatter_(0, index, value)  # a quarter of the time of index_copy_


def _shrink_sorted(ordered: tuple[Tensor, ...], strength: Tensor, *, compact: bool) -> list[Tensor]:
    """How much each of four sorted entries shrinks: the exact answer for every group.

    Where strength multiplies one factor only (``v1 * y2``), it is so that products of small numbers do not underflow.
    """
    y1, y2, y3, y4 = ordered
    v1, v2, v3, v4 = (_capped(y, strength) for y in ordered)
    w1, w2, w3, gain3 = three_sparse(v1, v2, v3, compact=compact)
    # For v1^2 + v2^2 <= 1 the third entry survives exactly if y3 > v1 y2. From ALWAYS_TWO on none does, and which of
    # two capped entries is the larger is lost.
    three = indicator(torch.lt, gain3, 0.0).mul_(indicator(torch.lt, v1, ALWAYS_TWO))
    small = indicator(torch.le, torch.addcmul(v1 * v1, v2, v2), 1.0)
    three = torch.lerp(three, indicator(torch.gt, y3, v1 * y2), small)

    # Which groups may be dense. A fourth entry above the largest possible e2 of the others never dies (sure), nor does
    # any at strength 0. For v1 + v2 + v3 <= 1 the objective is convex on the box [0, v]: there dense wins exactly if
    # the objective falls as the fourth entry leaves 0 at the 3-sparse point. Elsewhere a bound rules most groups out.
    sure = indicator(torch.ge, y4, torch.addcmul(v1 * y2, v1 + v2, y3)).mul_(indicator(torch.gt, y4, 0.0))
    if strength.dim() or not compact:
        sure = torch.maximum(sure, indicator(torch.eq, strength, 0.0))
    convex = indicator(torch.le, (v1 + v2).add_(v3), 1.0)
    falls = indicator(torch.gt, v4, torch.addcmul(w1 * w2, w1 + w2, w3))
    d2, d3 = v2 - v4, v3 - v4
    possible = indicator(torch.gt, v4, torch.addcmul(d2 * d3, v1 - v4, d2 + d3))
    candidate = torch.maximum(sure, torch.lerp(possible, falls, convex).mul_(three))
    sure = torch.maximum(sure, candidate * convex)

    if compact and float(candidate.sum()) < WORTHWHILE * candidate.numel():
        index = (candidate > 0).nonzero().squeeze(1)
        w4, four = torch.zeros_like(w1), torch.zeros_like(w1)
        if index.numel():
            some = [x.index_select(0, index) for x in (v1, v2, v3, v4, w1, w2, w3, gain3, candidate, sure)]
            _put((w1, w2, w3, w4, four), index, _with_dense(*some, compact=True))
    else:
        w1, w2, w3, w4, four = _with_dense(v1, v2, v3, v4, w1, w2, w3, gain3, candidate, sure, compact=compact)
    three = torch.maximum(three, four)

    strength = strength.clamp_min(torch.finfo(strength.dtype).tiny)
    pair, product = w3 + w4, w3 * w4
    s1 = torch.addcmul(product, w2, pair).div_(strength).mul_(three)
    s2 = torch.addcmul(product, w1, pair).div_(strength).mul_(three)
    both, product = w1 + w2, w1 * w2
    s3 = torch.addcmul(product, both, w4).div_(strength).mul_(three).add_((1 - three).mul_(_pruned(y1)))
    s4 = torch.addcmul(product, both, w3).div_(strength).mul_(four).add_((1 - four).mul_(_pruned(y1)))
    return [s1, s2, s3, s4]


def _with_dense(
    v1: Tensor,
    v2: Tensor,
    v3: Tensor,
    v4: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    gain3: Tensor,
    candidate: Tensor,
    sure: Tensor,
    *,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The better of the 3-sparse point ``w`` and the dense one, and 1.0 where that is the dense one."""
    p1, p2, p3, p4, gain4 = dense(v1, v2, v3, v4, compact=compact)
    wins = indicator(torch.gt, p4, 0.0).mul_(indicator(torch.lt, gain4, gain3)).mul_(candidate)
    wins = torch.maximum(wins, sure)
    return torch.lerp(w1, p1, wins), torch.lerp(w2, p2, wins), torch.lerp(w3, p3, wins), p4.mul_(wins), wins
