from __future__ import annotations

import pytest
import torch
from brute import hard_groups

from prox24_lightning.prox import critical_strength_24, prox_24, prox_24_reference

MARGIN = {torch.float32: 1e-5, torch.float64: 1e-9}


def kept(w: torch.Tensor) -> torch.Tensor:
    return (w != 0).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_just_above_it_is_24_and_just_below_it_is_not(dtype):
    y = hard_groups(3000, seed=10).to(dtype)
    critical = critical_strength_24(y).double()
    above = prox_24_reference(y, critical * (1 + MARGIN[dtype]))
    below = prox_24_reference(y, critical * (1 - MARGIN[dtype]))
    open_groups = critical.squeeze(-1) > 0
    assert int(kept(above).max()) <= 2
    assert int(kept(below)[open_groups].min()) >= 3


def test_equals_bisection_on_the_reference():
    y = hard_groups(120, seed=11)
    low, high = torch.zeros(120, 1, dtype=torch.float64), 1.3 / y.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    for _ in range(50):
        middle = (low + high) / 2
        sparse = (kept(prox_24_reference(y, middle)) <= 2).unsqueeze(-1)
        low, high = torch.where(sparse, low, middle), torch.where(sparse, middle, high)
    some = kept(y) > 2
    torch.testing.assert_close(critical_strength_24(y)[some], high[some], rtol=1e-9, atol=0)


def test_zero_exactly_where_the_group_is_24():
    y = hard_groups(3000, seed=12).float()
    assert torch.equal(critical_strength_24(y).squeeze(-1) == 0, kept(y) <= 2)


def test_batched_prox_switches_there():
    y = hard_groups(3000, seed=13).float()
    critical = critical_strength_24(y)
    assert int(kept(prox_24(y, critical * 1.0001)).max()) <= 2
    assert int(kept(prox_24(y, critical * 0.9999))[critical.squeeze(-1) > 0].min()) >= 3


@pytest.mark.parametrize("factor", [2.0**-140, 2.0**-100, 2.0**100])
def test_it_scales_against_the_weight(factor):
    y = hard_groups(500, seed=14).float().clamp(-8, 8)
    y = torch.where(y.abs() < 2.0**-6, 0.0, y).mul(2.0**6).round().mul(2.0**-6)  # exact also as subnormal numbers
    assert torch.equal(critical_strength_24(y * factor), (critical_strength_24(y).double() / factor).float())


def test_largest_jump():
    y = torch.tensor([2.0, -2.0, 2.0, 1.0], dtype=torch.float64)
    assert critical_strength_24(y).item() == pytest.approx((1 + 2**0.5) / 4, rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1])
def test_dim_scale_and_strides(dim):
    w = hard_groups(256, seed=15).reshape(16, 64)[:, ::2]
    scale = torch.linspace(0.5, 2, 32, dtype=torch.float64)
    want = critical_strength_24((w * scale).movedim(dim, -1).contiguous()).movedim(-1, dim)
    torch.testing.assert_close(critical_strength_24(w, dim=dim, scale=scale), want, rtol=1e-12, atol=0)


def test_special_values():
    y = torch.tensor([[0.0] * 4, [1.0, torch.nan, 2.0, 3.0], [torch.inf, 1.0, 1.0, 1.0], [1e-45, 1e-45, 1e-45, 0.0]])
    critical = critical_strength_24(y).squeeze(-1)
    assert critical[0] == 0
    assert critical[1].isnan()
    assert critical[2] == 0
    assert critical[3] == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    y = hard_groups(500, seed=16).clamp(-100, 100).to(dtype)
    critical = critical_strength_24(y)
    assert critical.dtype == torch.float32
    assert torch.equal(critical, critical_strength_24(y.float()))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="critical_strength_24 needs a real floating-point weight"):
        critical_strength_24(torch.ones(4, dtype=torch.int32))
