"""The two scalar equations behind the prox, vectorised: third entry of a 3-sparse group, fourth of a dense one.

All quantities are in lambda units (the weight times the strength), sorted, v1 >= v2 >= v3 >= v4 >= 0. Every
function takes separate tensors of one shape. DERIVATION.md beside this file has the algebra.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALLEY = {torch.float32: 4, torch.float64: 9}
"""Halley steps. Cubic convergence but for double roots (a switch from pruned to kept at a singular Hessian), where
the error in the root falls by 3 a step and that of the objective by 27."""

_TINY = {torch.float32: 1e-30, torch.float64: 1e-200}


def three_sparse(v1: Tensor, v2: Tensor, v3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stationary point with support {1, 2, 3}.

    Returns:
        ``(w1, w2, w3, gain)``, ``gain`` the objective minus that of keeping two entries, infinite where the
        iteration found no minimum that beats two entries.
    """
    total, diff = v1 + v2, v1 - v2
    # Right of the root: the wanted root is below both bounds and below the inflection of phi.
    gap1, gap2 = v1 - v3, v2 - v3
    b = 1 + gap1 + gap2
    c = v3 - gap1 * gap2
    upper = 2 * c / (b + (b * b + 4 * c).clamp_min_(0.0).sqrt_())
    square = v1 * v1 + v2 * v2
    tighter = (v3 - v1 * v2) / (1 - square)
    u = torch.where((square < 1) & (tighter < upper), tighter, upper)
    # Inflection (1 - q) / (1 + q), q = sqrt(diff / total); a winner has w3 <= 1/sqrt(2), so 0.75 cuts nothing.
    ratio = (diff / total.clamp_min(_TINY[v1.dtype])).sqrt_()
    u = torch.minimum(u, (1 - ratio) / (1 + ratio)).clamp_(0.0, 0.75)
    for _ in range(HALLEY[v1.dtype]):
        inverse = (1 - u * u).reciprocal_()
        w1, w2 = (v1 - u * v2) * inverse, (v2 - u * v1) * inverse
        phi = (u - v3) + w1 * w2
        across1, across2 = w1 - u * w2, w2 - u * w1
        slope = 1 - (w1 * across1 + w2 * across2) * inverse
        half_curve = 3 * inverse * inverse * across1 * across2
        square_slope = slope * slope
        den = torch.maximum(square_slope - phi * half_curve, square_slope / 2)
        u = (u - phi * slope / den.clamp_min_(_TINY[v1.dtype])).clamp_(0.0, 0.75)
    inverse = (1 - u * u).reciprocal_()
    w1, w2 = (v1 - u * v2) * inverse, (v2 - u * v1) * inverse
    norm = w1 * w1 + w2 * w2 - 1
    gain = u * ((u - v3) + w1 * w2 + u / 2 * norm)
    # norm < 0 is the criterion at the root. The other two turn away iterates that have no root to go to.
    wins = (norm < 0) & (w2 > 0) & (gain < 0)
    return w1, w2, u, torch.where(wins, gain, torch.inf)


def dense(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dense stationary point with a positive semi-definite Hessian, if there is one.

    Returns:
        ``(w1, w2, w3, w4, gain)``, ``gain`` the objective minus that of keeping two entries, exact for
        whatever point is returned.
    """
    tiny = _TINY[v1.dtype]
    delta = torch.stack([v1 - v4, v2 - v4, v3 - v4])
    d1, d2, d3 = delta
    b = 1 + 2 * (d1 + d2 + d3)
    c = v4 - (d1 * d2 + d2 * d3 + d3 * d1)
    upper = (2 * c / (b + (b * b + 12 * c).clamp_min_(0.0).sqrt_())).clamp_min_(0.0)
    k = (v1 + v2 + v3 - v4) / 2
    kappa = k - 0.25
    t = upper
    for _ in range(HALLEY[v1.dtype]):
        inverse = (t + 0.5).reciprocal_()
        x4, rest, total, x = _split(t, k, kappa, delta, inverse)
        value = rest.sum(0) + 6 * (-x4).clamp_min_(0.0) + 4 * t - total
        ix = x.reciprocal()
        spread = 1 + x4 * ix.sum(0)
        rate = total * inverse / 2
        slope = 2 * x4 * inverse + rate * spread
        curve = kappa * inverse**3 * (2 - spread) + rate * rate * (delta * ix * ix * ix).sum(0)
        square_slope = slope * slope
        den = torch.maximum(square_slope - value * curve / 2, square_slope / 2)
        t = torch.minimum((t - value * slope / den.clamp_min_(tiny)).clamp_min_(0.0), upper)
    x4, rest, _, _ = _split(t, k, kappa, delta, (t + 0.5).reciprocal_())
    w1, w2, w3 = rest + (t + 2 * (-x4).clamp_min_(0.0))
    product = w3 * t
    gain = (
        ((w1 - v1) ** 2 + (w2 - v2) ** 2 + w3 * w3 + t * t) / 2
        + (w3 + t) * w1 * w2
        + product * (w1 + w2)
        - v3 * w3
        - v4 * t
    )
    return w1, w2, w3, t, gain


def dense_at_zero(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor) -> Tensor:
    """The dense equation at w4 = 0, for v1 + v2 + v3 - v4 <= 1: there is a dense stationary point where it is < 0."""
    total = v1 + v2 + v3 - v4
    x4 = (1 - total) / 2
    square = x4 * x4
    value = -total
    for v in (v1, v2, v3):
        delta = v - v4
        value = value + delta / ((square + delta).sqrt_() + x4).clamp_min_(_TINY[v1.dtype])
    return value


def _split(
    t: Tensor, k: Tensor, kappa: Tensor, delta: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For w4 = t: x4, delta_i / (x_i + |x4|), the sum of w, and x_i = sqrt(x4^2 + delta_i)."""
    x4 = (t + 0.5 - kappa * inverse) / 2
    total = (t * t + t + k) * inverse
    x = (delta + x4 * x4).clamp_min_(_TINY[t.dtype] ** 0.5).sqrt_()
    return x4, delta / (x + x4.abs()), total, x
