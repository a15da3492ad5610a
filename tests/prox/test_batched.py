from __future__ import annotations

import numpy as np
import pytest
import torch
from brute import GAP, GOLDEN, hard_groups, relative_gap
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_lightning.prox import batched, prox_24, prox_24_reference

STRENGTHS = [0.05, 0.3, 0.6, 1.0, 2.5, 30.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_vectors(dtype):
    with np.load(GOLDEN) as file:
        y, lam = torch.from_numpy(file["y"]).to(dtype), torch.from_numpy(file["lam"]).to(dtype)
    best = prox_24_reference(y, lam.double()[:, None])
    assert relative_gap(prox_24(y, lam[:, None]), best, y, lam.double()).max() < GAP[dtype]


def test_golden_weights_in_float32():
    with np.load(GOLDEN) as file:
        golden = dict(file)
    y, lam = torch.from_numpy(golden["y"]), torch.from_numpy(golden["lam"])
    sharp = torch.from_numpy(golden["unique"] & (golden["gap2"] > 1e-5) & (golden["wsens32"] < 1e-5))
    w = prox_24(y.float(), lam.float()[:, None]).double()
    error = (w - torch.from_numpy(golden["w_star"])).abs().amax(1) / y.abs().amax(1).clamp_min(1e-300)
    assert bool((error <= torch.from_numpy(20 * golden["wsens32"] + 2e-6))[sharp].all())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_regimes(dtype, strength):
    y = hard_groups(3000, seed=2).to(dtype)
    best = prox_24_reference(y, float(torch.tensor(strength, dtype=dtype)))
    assert relative_gap(prox_24(y, strength), best, y, float(torch.tensor(strength, dtype=dtype))).max() < GAP[dtype]


@pytest.mark.parametrize("exponent", [-18, -12, 12, 18])
def test_tiny_and_huge_weights(exponent):
    y = (hard_groups(1500, seed=3) * 10.0**exponent).float()
    strength = float(torch.tensor(0.7 / 10.0**exponent))
    best = prox_24_reference(y, strength)
    # In units of the weights: squares of them do not fit into float64 comparisons at both ends.
    y, w, best = (x.double() / 10.0**exponent for x in (y, prox_24(y, strength), best))
    assert relative_gap(w, best, y, strength * 10.0**exponent).max() < 1e-6


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_path_without_gathering_gives_the_same(strength):
    y = hard_groups(4000, seed=4).float().T.contiguous()
    lam = torch.tensor(strength)
    gathered = batched._prox_chunk(y, lam, None, compact=True)
    plain = batched._prox_chunk(y, lam, None, compact=False)
    assert relative_gap(plain.T, gathered.double().T, y.T, strength).abs().max() < 1e-6
    assert torch.equal(plain != 0, gathered != 0)


finite = st.floats(-4, 4, width=32)


@settings(max_examples=60, derandomize=True)
@given(st.lists(finite, min_size=4, max_size=4), st.floats(0.01, 20), st.permutations(range(4)))
def test_sign_and_permutation_equivariance(values, strength, order):
    y = torch.tensor(values)
    w = prox_24(y, strength)
    assert torch.equal(prox_24(-y, strength), -w + 0.0)
    if len({abs(value) for value in values}) == 4:
        assert torch.equal(prox_24(y[list(order)], strength), w[list(order)])


@settings(max_examples=50, derandomize=True)
@given(st.lists(finite, min_size=4, max_size=4), st.floats(0.01, 20), st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**20]))
def test_scaling_of_the_weight_and_the_strength(values, strength, factor):
    y = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(prox_24(y * factor, strength / factor), factor * prox_24(y, strength), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strength_zero_is_the_identity(dtype):
    y = hard_groups(500, seed=5).to(dtype)
    assert torch.equal(prox_24(y, 0.0), y)


@pytest.mark.parametrize("strength", [0.3, 3.0, torch.inf])
def test_a_24_group_is_a_fixed_point(strength):
    y = hard_groups(500, seed=6).float()
    y = y * torch.tensor([[0, 1, 0, 1.0]])[:, torch.randperm(4, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(prox_24(y, strength), y)


def test_infinite_strength_keeps_the_first_two_of_the_largest():
    y = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.5, 2.0, -2.0, 2.0], [3.0, 0.0, 1e-30, -2e-30], [0.0, 0.0, 0.0, 1.0]])
    want = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 2.0, -2.0, 0.0], [3.0, 0.0, 0.0, -2e-30], [0.0, 0.0, 0.0, 1.0]])
    assert torch.equal(prox_24(y, torch.inf), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_among_equals_the_earlier_position_stays(dtype):
    group = torch.tensor([[0.75, -0.75, 0.75, -0.75]], dtype=dtype).repeat(300, 1)
    # Kept by rank at the jump: two of four equals, and three of four.
    assert torch.equal(prox_24(group, 2.0) != 0, torch.tensor([[True, True, False, False]]).expand(300, 4))
    ties = torch.tensor([[0.3, -1.0, 0.3, -1.0]], dtype=dtype).repeat(300, 1)
    assert torch.equal(prox_24(ties, 0.5) != 0, prox_24_reference(ties, 0.5) != 0)


def test_pruned_entries_are_never_negative_zero():
    w = prox_24(-hard_groups(2000, seed=7).abs().float(), 1.0)
    zeros = w[w == 0]
    assert zeros.numel() > 1000
    assert not torch.signbit(zeros).any()


def test_nan_spoils_its_own_group_only():
    y = hard_groups(100, seed=8).float()
    clean = prox_24(y, 1.0)
    y[17, 2] = torch.nan
    w = prox_24(y, 1.0)
    assert bool(w[17].isnan().all())
    assert torch.equal(torch.cat([w[:17], w[18:]]), torch.cat([clean[:17], clean[18:]]))


def test_infinite_entries_are_the_largest():
    y = torch.tensor([[1.0, torch.inf, 2.0, 0.5], [torch.inf, -torch.inf, torch.inf, 1.0]])
    want = torch.tensor([[0.0, torch.inf, 2.0, 0.0], [torch.inf, -torch.inf, 0.0, 0.0]])
    assert torch.equal(prox_24(y, 1e-3), want)
    assert torch.equal(prox_24(y, 0.0), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    y = hard_groups(2000, seed=9).clamp(-1000, 1000).to(dtype)
    assert torch.equal(prox_24(y, 0.8), prox_24(y.float(), 0.8).to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (4,), (3, 8), (2, 12, 3, 5), (70000, 4), (2, 400000)])
def test_chunks_cover_every_group_once(shape):
    groups = torch.zeros(*shape[:-1], shape[-1] // 4)
    for part in batched.chunks(groups.shape, 4096):
        groups[part] += 1
    assert bool((groups == 1).all())
