"""The fused kernel for one weight ends at the optimum, whatever the group, the layout and the number of groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute import GAP, GOLDEN, relative_gap

from prox24_lightning.prox import prox_24, prox_24_reference, settle_24
from prox24_lightning.prox.triton.launch import prox_24_triton

GAP32 = GAP[torch.float32]


def test_golden_vectors():
    with np.load(GOLDEN) as file:
        y, lam = torch.from_numpy(file["y"][::16]).float(), torch.from_numpy(file["lam"][::16]).float()
    w = prox_24_triton(y, lam[:, None], out=torch.full_like(y, torch.nan))
    best = prox_24_reference(y, lam.double()[:, None])
    assert relative_gap(w, best, y, lam.double()).max() < GAP32


def test_small_equal_entries_beside_a_large_one():
    small = 0.00016303927986882627
    y = torch.tensor([[0.9547580480575562, small, small, small]])
    assert relative_gap(prox_24_triton(y, 1.0), prox_24(y.double(), 1.0), y, 1.0).max() < GAP32


@pytest.mark.parametrize("settle", [False, True])
def test_an_infinite_strength_keeps_the_two_largest_of_denormal_entries(settle):
    y = torch.tensor([[10, 1e-40, -1e-40, 0], [1e-40, 1e-40, 1e-40, 1e-40]])
    w = prox_24_triton(y, torch.inf, settle=settle)
    assert torch.equal(w, torch.where(torch.tensor([True, True, False, False]), y, 0.0))


@pytest.mark.parametrize("strength", [0.125, 0.75])
def test_hard_groups_in_place_and_along_columns(groups, strength):
    groups = groups[:308]
    want = prox_24_triton(groups, strength)
    assert relative_gap(want, prox_24(groups.double(), strength), groups, strength).max() < GAP32
    inplace = groups.clone()
    assert torch.equal(prox_24_triton(inplace, strength, out=inplace), want)
    columns = groups.reshape(-1, 44).T.contiguous()
    torch.testing.assert_close(
        prox_24_triton(columns, strength, dim=0, out=columns).T, want.reshape(-1, 44), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("number", [1, 31, 32, 127, 129, 300])
@pytest.mark.parametrize("strength", [0.1, 0.4])
def test_every_group_leaves_the_queue(number, strength):
    y = torch.randn(number, 4, generator=torch.Generator().manual_seed(number)) * 0.6
    w = prox_24_triton(y, strength, out=torch.full_like(y, torch.nan))
    strength = float(torch.tensor(strength))
    assert relative_gap(w, prox_24(y.double(), strength), y, strength).max() < GAP32


def test_nan_spreads_to_its_group_and_among_equals_the_earlier_stay():
    w = prox_24_triton(torch.tensor([[1, torch.nan, 2, 3], [0.75, -0.75, 0.75, -0.75]]), 2.0)
    assert bool(w[0].isnan().all())
    assert torch.equal(w[1], torch.tensor([0.75, -0.75, 0, 0]))


def test_settling(groups):
    assert torch.equal(prox_24_triton(groups[:300], 0.75, settle=True), settle_24(groups[:300], 0.75))
