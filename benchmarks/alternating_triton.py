"""The published alternating minimisation as a fused Triton kernel: what fusing alone brings."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


def alternating_triton(weight: Tensor, strength: Tensor, out: Tensor, *, sweeps: int) -> None:
    """As ``alternating_minimisation``, without its stop, for contiguous groups along the last dimension on a GPU."""
    groups = weight.numel() // 4
    _alternating_kernel[(triton.cdiv(groups, BLOCK),)](weight, out, strength, groups, SWEEPS=sweeps, BLOCK=BLOCK)


@triton.jit
def _alternating_kernel(weight, out, strength, groups, SWEEPS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = (group < groups)[:, None] & (tl.arange(0, 4)[None, :] >= 0)
    values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, [BLOCK, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    lam = tl.load(strength)
    swap02, a0, a2 = _sorted(tl.abs(x0), tl.abs(x2))
    swap13, a1, a3 = _sorted(tl.abs(x1), tl.abs(x3))
    swap01, y1, b1 = _sorted(a0, a1)
    swap23, b2, y4 = _sorted(a2, a3)
    swap12, y2, y3 = _sorted(b1, b2)
    zero = tl.zeros_like(y1)
    t1, t2, t3 = zero, zero, zero
    d1, d2, d3, d4 = zero, zero, zero, zero
    for _ in range(SWEEPS):
        t3 = tl.maximum(y3 - lam * (t1 * t2), 0.0)
        t2 = tl.maximum(y2 - lam * (t1 * t3), 0.0)
        t1 = tl.maximum(y1 - lam * (t2 * t3), 0.0)
        d4 = tl.maximum(y4 - lam * (d1 * d2 + (d1 + d2) * d3), 0.0)
        d3 = tl.maximum(y3 - lam * (d1 * d2 + (d1 + d2) * d4), 0.0)
        d2 = tl.maximum(y2 - lam * (d1 * d3 + (d1 + d3) * d4), 0.0)
        d1 = tl.maximum(y1 - lam * (d2 * d3 + (d2 + d3) * d4), 0.0)
    two = 0.5 * (y3 * y3 + y4 * y4)
    three = _objective(t1, t2, t3, zero, y1, y2, y3, y4, lam)
    four = _objective(d1, d2, d3, d4, y1, y2, y3, y4, lam)
    best3 = three < two
    w1, w2, w3, w4 = tl.where(best3, t1, y1), tl.where(best3, t2, y2), tl.where(best3, t3, 0.0), zero
    best4 = four < tl.minimum(two, three)
    w1, w2 = tl.where(best4, d1, w1), tl.where(best4, d2, w2)
    w3, w4 = tl.where(best4, d3, w3), tl.where(best4, d4, w4)
    b1, b2 = tl.where(swap12, w3, w2), tl.where(swap12, w2, w3)
    a0, a1 = tl.where(swap01, b1, w1), tl.where(swap01, w1, b1)
    a2, a3 = tl.where(swap23, w4, b2), tl.where(swap23, b2, w4)
    r0, r2 = tl.where(swap02, a2, a0), tl.where(swap02, a0, a2)
    r1, r3 = tl.where(swap13, a3, a1), tl.where(swap13, a1, a3)
    r0, r1 = tl.where(x0 < 0, -r0, r0), tl.where(x1 < 0, -r1, r1)
    r2, r3 = tl.where(x2 < 0, -r2, r2), tl.where(x3 < 0, -r3, r3)
    result = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BLOCK, 4])
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sorted(a, b):
    return a < b, tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _objective(w1, w2, w3, w4, y1, y2, y3, y4, lam):
    e1, e2, e3, e4 = w1 - y1, w2 - y2, w3 - y3, w4 - y4
    return 0.5 * (e1 * e1 + e2 * e2 + e3 * e3 + e4 * e4) + lam * (w1 * w2 * (w3 + w4) + w3 * w4 * (w1 + w2))
