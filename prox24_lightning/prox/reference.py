"""The exact 2:4 proximal operator in float64: slow, readable, converged. Every faster path is tested against it.

DERIVATION.md beside this file proves what is used here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prox24_lightning.weights.groups import check_weight, from_groups, group_shape, leave_graph, to_groups

ITERATIONS = 100
"""Newton steps. The sequences are monotone and quadratic except at double roots, where each step halves the error:
100 steps reach the last bit even there."""


def prox_24_reference(
    weight: Tensor, strength: float | Tensor, *, dim: int = -1, scale: Tensor | None = None
) -> Tensor:
    """Solve ``argmin_w 1/2 ||w - weight||^2 + strength * r(w)`` group by group, in float64.

    ``r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|`` (arXiv 2501.18015). The paper solves three convex
    subproblems by alternating minimisation, which can stop at a point that is not the minimiser; here each
    subproblem is one scalar equation, solved by a Newton iteration that provably converges from its starting
    point.

    Args:
        weight: any floating dtype; ``(out_features, in_features)`` for a linear layer.
        strength: lambda >= 0, units 1/weight (1/(weight * scale) with ``scale``); a float, or a tensor that
            broadcasts against :func:`~prox24_lightning.weights.groups.group_shape`.
        dim: the dimension along which the groups lie.
        scale: positive, broadcasts to ``weight``: the prox is taken in the coordinates ``weight * scale``.

    Returns:
        float64 tensor of the shape of ``weight``. A group that holds NaN comes back as NaN.
    """
    check_weight(weight, "prox_24_reference")
    leave_graph("prox_24_reference", "use prox_24 there")
    original = weight.detach().to(torch.float64)
    scaled = original if scale is None else original * scale.to(torch.float64)
    groups = to_groups(scaled, dim)
    shape = group_shape(weight.shape, dim)
    strength = torch.as_tensor(strength, dtype=torch.float64, device=weight.device).expand(shape)
    strength = strength.movedim(dim, -1).unsqueeze(-1)

    # Stable sort: among equal magnitudes the earlier position counts as the larger.
    sorted_abs, order = groups.abs().sort(dim=-1, descending=True, stable=True)
    shrink, keep = _shrink_sorted(sorted_abs, strength)
    keep |= strength == 0  # also where an infinite entry makes every comparison undefined
    shrink = torch.empty_like(shrink).scatter_(-1, order, shrink)
    keep = torch.empty_like(keep).scatter_(-1, order, keep)

    shrink, keep = from_groups(shrink, dim), from_groups(keep, dim)
    if scale is not None:
        shrink = shrink / scale.to(torch.float64)
    result = torch.where(keep, (original.abs() - shrink).clamp_min(0.0), 0.0)
    result = torch.where(original < 0, -result, result) + 0.0
    nan = from_groups(groups.isnan().any(dim=-1, keepdim=True).expand(groups.shape), dim)
    return result.masked_fill(nan, torch.nan)


def _shrink_sorted(y: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """For sorted magnitudes ``y`` (..., 4): how much each kept entry shrinks, and which entries are kept."""
    # "Lambda units": v = strength * y, W = strength * w turn the problem into the one with strength 1. 0 * inf counts
    # as 0: strength 0 leaves an infinite entry alone, and an infinite strength leaves a zero alone.
    v = (strength * y).nan_to_num(nan=0.0, posinf=torch.inf)
    v1, v2, v3, _ = v.unbind(-1)
    y1, y2, y3, y4 = y.unbind(-1)

    # For v1^2 + v2^2 <= 1 the third entry survives exactly if y3 > v1 y2; the strength multiplies one factor only, so
    # that the comparison does not underflow. Beyond that the jump of the cubic equation decides.
    three_w, three_wins, three_gain = _three_sparse(v)
    three_wins = torch.where(v1**2 + v2**2 <= 1, y3 > v1 * y2, three_wins)
    dense_w, dense_exists, dense_gain = _dense(v)
    # A fourth entry above the largest possible e2 of the others never dies. For v1 + v2 + v3 <= 1 the objective is
    # convex on the whole box [0, v], so a dense stationary point is the minimiser. By the nesting theorem dense
    # beats 2-sparse only where 3-sparse does.
    certain = (y4 > 0) & (y4 >= v1 * y2 + v2 * y3 + v3 * y1)
    convex = v1 + v2 + v3 <= 1
    dense_wins = certain | (three_wins & dense_exists & (convex | ((dense_gain < 0) & (dense_gain < three_gain))))
    three_wins |= dense_wins
    always = torch.ones_like(three_wins)

    w = torch.where(dense_wins.unsqueeze(-1), dense_w, three_w)
    # The stationary point in shift form, w_i = y_i - e2(others) / strength, is exact as strength |y| -> 0. Where the
    # map contracts, a few rounds of it take away the absolute error of c + x_i.
    small = (v1 + v2 + v3 <= 0.5).unsqueeze(-1)
    support = torch.stack([always, always, always, dense_wins], dim=-1)
    for _ in range(50):
        w = torch.where(small & support, (v - _shifts(w)).clamp_min(0.0), w)
    e2 = _shifts(w)
    shrink = torch.where(three_wins.unsqueeze(-1), e2, 0.0) / torch.where(strength > 0, strength, 1.0)
    return shrink, torch.stack([always, always, three_wins, dense_wins], dim=-1)


def _three_sparse(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best point with support {1, 2, 3}: (w, whether it beats keeping two entries, objective minus that of two)."""
    v1, v2, v3, _ = v.unbind(-1)
    total, diff = v1 + v2, v1 - v2
    # The wanted root of phi lies left of its inflection, in the convex increasing part, and below both bounds.
    ratio = (diff / total).nan_to_num(nan=0.0).sqrt()
    inflection = (1 - ratio) / (1 + ratio)
    gap1, gap2 = v1 - v3, v2 - v3
    b, c = 1 + gap1 + gap2, v3 - gap1 * gap2
    upper = 2 * c / (b + (b * b + 4 * c).clamp_min(0.0).sqrt())
    u = torch.minimum(upper, inflection).clamp(0.0, 0.75)  # a winner has u <= 1/sqrt(2)
    alive = c > 0
    for _ in range(ITERATIONS):
        plus, minus = total / (1 + u), diff / (1 - u)  # w1 + w2 and w1 - w2 at this u
        phi = u - v3 + (plus**2 - minus**2) / 4
        slope = 1 - plus**2 / (2 * (1 + u)) - minus**2 / (2 * (1 - u))
        alive &= (slope > 0) | (phi <= 0)
        before = u
        u = torch.where(slope > 0, u - phi / slope, u).clamp(0.0, 0.75)
        if torch.equal(u, before):
            break
    w1, w2 = (v1 - u * v2) / (1 - u * u), (v2 - u * v1) / (1 - u * u)
    wins = alive & (u > 0) & (w1 * w1 + w2 * w2 < 1)
    gain = u * (u - v3 + w1 * w2) + u * u / 2 * (w1 * w1 + w2 * w2 - 1)
    return torch.stack([w1, w2, u, torch.zeros_like(u)], dim=-1), wins, gain


def _dense(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one dense stationary point with a PSD Hessian: (w, whether there is one, objective minus that of two)."""
    v1, v2, v3, v4 = v.unbind(-1)
    delta = v - v4.unsqueeze(-1)
    kappa = (v1 + v2 + v3 - v4) / 2 - 0.25
    # w_i = c + x_i with x_i = sqrt(x4^2 + delta_i); the unknown is x4 itself where kappa >= 0, and half the
    # sum of w where kappa < 0. Both equations are convex and increasing right of the wanted root; 1/3 is right of it.
    by_sum = kappa < 0
    z = torch.full_like(v1, 1 / 3)
    alive = torch.ones_like(by_sum)
    for _ in range(ITERATIONS):
        x4 = torch.where(by_sum, (z * z - kappa).clamp_min(0.0).sqrt(), z)
        half_sum = torch.where(by_sum, z, (z * z + kappa).clamp_min(0.0).sqrt())
        x = (x4.unsqueeze(-1) ** 2 + delta[..., :3]).sqrt()
        value = 2 * half_sum + x4 + x.sum(-1) - 2
        # d(half_sum) = x4 / half_sum * d(x4), as half_sum^2 - x4^2 = kappa.
        slope_x4 = 2 * x4 / half_sum + 1 + x4 * (1 / x).sum(-1)
        slope = torch.where(by_sum, slope_x4 * half_sum / x4, slope_x4)
        alive &= (slope > 0) | (value <= 0)
        before = z
        z = torch.where(slope > 0, z - value / slope, z)
        if torch.equal(z, before):
            break
    x4 = torch.where(by_sum, (z * z - kappa).clamp_min(0.0).sqrt(), z)
    half_sum = torch.where(by_sum, z, (z * z + kappa).clamp_min(0.0).sqrt())
    x = torch.cat([(x4.unsqueeze(-1) ** 2 + delta[..., :3]).sqrt(), x4.unsqueeze(-1)], dim=-1)
    w = x + (half_sum - 0.5).unsqueeze(-1)
    exists = alive & (half_sum > 0) & (w[..., 3] > 0) & w.isfinite().all(-1)
    w = torch.minimum(w.nan_to_num(nan=0.0).clamp_min(0.0), v)
    w1, w2, w3, w4 = w.unbind(-1)
    pair, product = w3 + w4, w3 * w4
    gain = (
        ((w1 - v1) ** 2 + (w2 - v2) ** 2 + w3 * w3 + w4 * w4) / 2
        + pair * w1 * w2
        + product * (w1 + w2)
        - v3 * w3
        - v4 * w4
    )
    return w, exists, gain


def _shifts(w: Tensor) -> Tensor:
    """For each entry e2 of the three others, e2(a, b, c) = ab + bc + ca."""
    w1, w2, w3, w4 = w.unbind(-1)
    triples = ((w2, w3, w4), (w1, w3, w4), (w1, w2, w4), (w1, w2, w3))
    return torch.stack([a * b + b * c + c * a for a, b, c in triples], dim=-1)
