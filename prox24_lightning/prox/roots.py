"""The two scalar equations behind the prox, vectorised: third entry of a 3-sparse group, fourth of a dense one.

All quantities are in lambda units (the weight times the strength), sorted, v1 >= v2 >= v3 >= v4 >= 0, at most
:data:`CAP`, one tensor of shape ``(groups,)`` each. DERIVATION.md beside this file has the algebra.

Selections are written as arithmetic with 0/1 floats: on CPU ``torch.where`` on a random mask costs as much as sixteen
multiplications.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CAP = 4.0
"""Entries beyond 1.2072 settle their group before any equation, so larger ones are cut: nothing overflows."""

HALLEY = {torch.float32: 4, torch.float64: 9}
"""Halley steps in all. Convergence is cubic but for double roots (a switch between pruned and kept at a singular
Hessian), where the error in the root falls by 3 a step and that of the objective by 27."""

FIRST = 2
"""Steps for every group where the unfinished ones can be picked out afterwards."""

FINISHED = {torch.float32: 2e-3, torch.float64: 1e-5}
"""A group whose last step was below this is done: the next error is about the third power of it."""

_TINY = {torch.float32: 1e-30, torch.float64: 1e-200}


def indicator(compare: Callable[..., Tensor], left: Tensor, right: Tensor | float) -> Tensor:
    """``compare(left, right)`` as 1.0 and 0.0: several times as fast on CPU as a bool tensor and its conversion."""
    return compare(left, right, out=torch.empty_like(left))


def three_sparse(v1: Tensor, v2: Tensor, v3: Tensor, *, compact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stationary point with support {1, 2, 3} as ``(w1, w2, w3, gain)``.

    ``gain`` is the objective minus that of keeping two entries; it is 0 where the iteration found no minimum that
    beats them.
    """
    tiny = _TINY[v1.dtype]
    # Right of the root: the wanted root is below both bounds and below the inflection of phi.
    gap1, gap2 = v1 - v3, v2 - v3
    b = gap1 + gap2 + 1
    c = torch.addcmul(v3, gap1, gap2, value=-1).mul_(2)
    upper = c / torch.addcmul(2 * c, b, b).clamp_min_(0.0).sqrt_().add_(b)
    room = torch.addcmul(v1 * v1, v2, v2).neg_().add_(1).clamp_min_(tiny)  # 1 - v1^2 - v2^2; no bound if negative
    tighter = torch.addcmul(v3, v1, v2, value=-1).div_(room)
    tighter = torch.maximum(tighter, indicator(torch.le, room, tiny))
    ratio = ((v1 - v2) / (v1 + v2).clamp_min_(tiny)).sqrt_()
    inflection = (1 - ratio).div_(ratio.add_(1))
    # A winner has w3 <= 1/sqrt(2), so 0.75 cuts nothing.
    u = torch.minimum(torch.minimum(upper, tighter), inflection).clamp_(0.0, 0.75)
    u = _halley(_three_sparse_step, u, (v1, v2, v3), compact)
    inverse = (1 - u * u).reciprocal_()
    w1 = torch.addcmul(v1, u, v2, value=-1).mul_(inverse)
    w2 = torch.addcmul(v2, u, v1, value=-1).mul_(inverse)
    norm = torch.addcmul(w1 * w1, w2, w2).sub_(1)
    gain = torch.addcmul(u - v3, w1, w2).addcmul_(u, norm, value=0.5).mul_(u)
    # norm < 0 is the criterion at the root. The other two turn away iterates that have no root to go to.
    return w1, w2, u, gain.mul_(indicator(torch.lt, torch.maximum(torch.maximum(norm, gain), -w2), 0.0))


def _three_sparse_step(u: Tensor, v1: Tensor, v2: Tensor, v3: Tensor) -> Tensor:
    inverse = (1 - u * u).reciprocal_()
    w1 = torch.addcmul(v1, u, v2, value=-1).mul_(inverse)
    w2 = torch.addcmul(v2, u, v1, value=-1).mul_(inverse)
    phi = torch.addcmul(u - v3, w1, w2)
    across1, across2 = torch.addcmul(w1, u, w2, value=-1), torch.addcmul(w2, u, w1, value=-1)
    slope = w1.mul_(across1).addcmul_(w2, across2).mul_(inverse).neg_().add_(1)
    curve = inverse.mul_(inverse).mul_(across1).mul_(across2)  # phi'' / 6
    return _halley_step(u, phi, slope, curve.mul_(3)).clamp_(0.0, 0.75)


def dense(
    v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, *, compact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dense stationary point with a positive semi-definite Hessian, if there is one, as ``(w1, w2, w3, w4, gain)``.

    ``gain`` is the objective minus that of keeping two entries, exact for whatever point is returned.
    """
    d1, d2, d3 = v1 - v4, v2 - v4, v3 - v4
    b = (d1 + d2).add_(d3).mul_(2).add_(1)
    c = torch.addcmul(v4, d1 + d3, d2, value=-1).addcmul_(d1, d3, value=-1).clamp_min_(0.0).mul_(2)
    upper = c / torch.addcmul(6 * c, b, b).sqrt_().add_(b)
    k = (v1 + v2).add_(v3).sub_(v4).mul_(0.5)
    t = _halley(_dense_step, upper, (upper, k, d1, d2, d3), compact)

    w1, w2, w3, rate = _dense_point(t, k, d1, d2, d3)
    # The equation loses what is small against v1 (it subtracts sums). The stationarity of w4 does not: one Newton step
    # on it makes w4 accurate in itself. Near the jumps, v1 + v2 + v3 > 0.9, its slope may vanish; there it is left out.
    pair = w1 + w2
    residual = torch.addcmul(t - v4, w1, w2).addcmul_(pair, w3)
    slope = torch.addcmul(torch.addcmul(torch.ones_like(t), pair, rate[2]), w2 + w3, rate[0]).addcmul_(w1 + w3, rate[1])
    calm = indicator(torch.le, v1 + v2 + v3, 0.9).div_(slope.clamp_min_(0.05))
    t = torch.maximum(torch.addcmul(t, residual, calm, value=-1), t * 1e-3)
    w1, w2, w3, _ = _dense_point(t, k, d1, d2, d3)
    pair, product = w3 + t, w3 * t
    off1, off2 = w1 - v1, w2 - v2
    gain = torch.addcmul(off1 * off1, off2, off2).addcmul_(w3, w3).addcmul_(t, t).mul_(0.5)
    gain.addcmul_(pair.mul_(w1), w2).addcmul_(product, w1 + w2).addcmul_(v3, w3, value=-1).addcmul_(v4, t, value=-1)
    return w1, w2, w3, t, gain


def _dense_point(
    t: Tensor, k: Tensor, d1: Tensor, d2: Tensor, d3: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """w1, w2, w3 for w4 = t, and their derivatives by t."""
    inverse = (t + 0.5).reciprocal_()
    x4, total = _fourth(t, k, inverse)
    base = torch.add(t, (-x4).clamp_min_(0.0), alpha=2)
    square, size = x4 * x4, x4.abs()
    total.mul_(inverse).mul_(0.5)  # dx4 / dt
    point, rates = [], []
    for d in (d1, d2, d3):
        x = (d + square).clamp_min_(_TINY[t.dtype] ** 0.5).sqrt_()
        rates.append(torch.addcmul(torch.ones_like(t), total, (x4 / x).sub_(1)))
        point.append(torch.addcdiv(base, d, x.add_(size)))
    return point[0], point[1], point[2], rates


def _dense_step(t: Tensor, upper: Tensor, k: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> Tensor:
    tiny = _TINY[t.dtype]
    inverse = (t + 0.5).reciprocal_()
    x4, total = _fourth(t, k, inverse)
    square, size = x4 * x4, x4.abs()
    value = torch.add(4 * t, (-x4).clamp_min_(0.0), alpha=6).sub_(total)
    spread, bend = torch.zeros_like(t), torch.zeros_like(t)
    for d in (d1, d2, d3):
        x = (d + square).clamp_min_(tiny**0.5).sqrt_()
        value.add_(d / (x + size))
        x.reciprocal_()
        spread.add_(x)
        bend.addcmul_(x * x, x.mul_(d))
    spread.mul_(x4).add_(1)
    rate = total.mul_(inverse).mul_(0.5)
    slope = torch.addcmul(rate * spread, x4, inverse, value=2)
    cubed = (inverse * inverse).mul_(inverse).mul_(k - 0.25)
    curve = torch.addcmul(rate.mul_(rate).mul_(bend), cubed, spread.neg_().add_(2)).mul_(0.5)
    return torch.minimum(_halley_step(t, value, slope, curve).clamp_min_(0.0), upper)


def _fourth(t: Tensor, k: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """For w4 = t: x4 = w4 - (sum of w - 1) / 2, and the sum of w; ``inverse`` is 1 / (t + 1/2)."""
    x4 = torch.addcmul(t + 0.5, k - 0.25, inverse, value=-1).mul_(0.5)
    total = torch.addcmul(k, t, t + 1).mul_(inverse)
    return x4, total


def _halley_step(x: Tensor, value: Tensor, slope: Tensor, half_curve: Tensor) -> Tensor:
    """One step of Halley's method, at most twice Newton's. Overwrites ``value``."""
    square = slope * slope
    den = torch.maximum(torch.addcmul(square, value, half_curve, value=-1), square.mul_(0.5))
    return x - value.mul_(slope).div_(den.clamp_min_(_TINY[x.dtype]))


def _halley(step: Callable[..., Tensor], x: Tensor, args: tuple[Tensor, ...], compact: bool) -> Tensor:
    """Iterate ``x = step(x, *args)``; with ``compact`` only the groups that are not finished after :data:`FIRST` steps
    go on."""
    steps = HALLEY[x.dtype]
    if not compact:
        for _ in range(steps):
            x = step(x, *args)
        return x
    for _ in range(FIRST):
        before, x = x, step(x, *args)
    index = (before.sub_(x).abs_() > FINISHED[x.dtype]).nonzero().squeeze(1)
    if index.numel():
        some = x.index_select(0, index)
        args = tuple(arg.index_select(0, index) for arg in args)
        for _ in range(steps - FIRST):
            some = step(some, *args)
        x.scatter_(0, index, some)
    return x
