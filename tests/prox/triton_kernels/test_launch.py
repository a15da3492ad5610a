"""The fused kernel on a CUDA GPU: ``pytest -m gpu tests/prox``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute import GAP, GOLDEN, hard_groups, relative_gap

from prox24_lightning.mask.codes import flipped_entries
from prox24_lightning.prox import MultiTensorProx, prox_24, prox_24_reference, prox_path, settle_24, why_batched

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


def test_golden_vectors():
    with np.load(GOLDEN) as file:
        y, lam = torch.from_numpy(file["y"]).float(), torch.from_numpy(file["lam"]).float()
    assert prox_path(y.cuda()) == "triton"
    w = prox_24(y.cuda(), lam.cuda()[:, None]).cpu()
    best = prox_24_reference(y, lam.double()[:, None])
    assert relative_gap(w, best, y, lam.double()).max() < GAP[torch.float32]


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 1.0, 2.5, 30.0])
def test_hard_regimes(strength):
    y = hard_groups(100_000, seed=21).float()
    best = prox_24(y.double(), float(torch.tensor(strength)))
    w = prox_24(y.cuda(), strength).cpu()
    assert relative_gap(w, best, y, float(torch.tensor(strength))).max() < GAP[torch.float32]


def test_small_equal_entries_beside_a_large_one():
    """As in SmolLM2: sums that hold the large entry lose what decides about the small ones, and the Hessian is nearly
    singular."""
    large = torch.linspace(0.5, 1.2, 4000)
    small = torch.logspace(-6, -1, 4000)[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    y = torch.stack([large, small, small, small * torch.linspace(0.99, 1, 4000)], 1)
    best = prox_24(y.double(), 1.0)
    assert relative_gap(prox_24(y.cuda(), 1.0).cpu(), best, y, 1.0).max() < 3 * GAP[torch.float32]


def test_next_to_a_singular_hessian():
    """Where the third entry just appears slopes are no more than rounding, and a step along one must stay short."""
    generator = torch.Generator().manual_seed(1)
    angle, share, noise = torch.rand(3, 100_000, generator=generator, dtype=torch.float64)
    first, second = (angle * torch.pi / 4).cos(), (angle * torch.pi / 4).sin()
    third = first * second * (1 + 1e-5 * (noise - 0.5) ** 3)
    y = torch.stack([first, second, third, third * share], 1).float()
    best = prox_24(y.double(), 1.0)
    assert relative_gap(prox_24(y.cuda(), 1.0).cpu(), best, y, 1.0).max() < GAP[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    y = hard_groups(4000, seed=22).clamp(-100, 100).to(dtype).cuda()
    assert torch.equal(prox_24(y, 0.8), prox_24(y.float(), 0.8).to(dtype))


@pytest.mark.parametrize("shape, dim", [((64, 96), 0), ((64, 96), 1), ((12, 8, 3, 3), 1), ((8,), 0), ((4, 999), 0)])
def test_layouts_scale_and_strength(shape, dim):
    y = hard_groups(torch.Size(shape).numel() // 4, seed=23).clamp(-30, 30).float().reshape(shape)
    scale = torch.linspace(0.3, 3, shape[-1])
    groups = [size // 4 if axis == dim else size for axis, size in enumerate(shape)]
    strength = torch.rand(groups, generator=torch.Generator().manual_seed(0)) + 0.1
    out = torch.full_like(y, torch.nan).cuda()
    prox_24(y.cuda(), strength.cuda(), dim=dim, scale=scale.cuda(), out=out)
    torch.testing.assert_close(out.cpu(), prox_24(y, strength, dim=dim, scale=scale), rtol=2e-4, atol=2e-5)


def test_one_strength_a_row_and_a_column():
    y = hard_groups(64 * 16, seed=24).clamp(-30, 30).float().reshape(64, 64).cuda()
    rows = torch.linspace(0.1, 2, 64, device="cuda")[:, None]
    one_by_one = torch.cat([prox_24(r[None], s) for r, s in zip(y, rows, strict=True)])
    best = prox_24(y.double(), rows.double())
    strengths = rows.double().cpu().expand(64, 16).reshape(-1)
    for got in (prox_24(y, rows), prox_24(y.T.contiguous(), rows.T, dim=0).T):
        groups = [part.cpu().reshape(-1, 4) for part in (got, best, y)]
        assert relative_gap(*groups, strengths).max() < GAP[torch.float32]
    # Which solver a group goes to depends on how many others wait beside it.
    torch.testing.assert_close(prox_24(y, rows), one_by_one, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(prox_24(y.T.contiguous(), rows.T, dim=0), prox_24(y, rows).T, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("groups", [1, 31, 32, 95, 96, 97, 4000, 50_001])
def test_every_entry_is_written_whatever_the_number_of_groups(groups):
    y = torch.randn(groups, 4, generator=torch.Generator().manual_seed(groups)) * 0.6
    out = torch.full_like(y, torch.nan).cuda()
    prox_24(y.cuda(), 0.7, out=out)
    best = prox_24(y.double(), float(torch.tensor(0.7)))
    assert relative_gap(out.cpu(), best, y, float(torch.tensor(0.7))).max() < GAP[torch.float32]
    z = y.cuda()
    assert torch.equal(prox_24(z, 0.7, out=z), out)


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.4, 0.7, 1.0, 2.0])
def test_gaussian_groups_in_every_queue(strength):
    y = torch.randn(1 << 18, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    best = prox_24(y.double(), float(torch.tensor(strength)))
    gap = relative_gap(prox_24(y, strength), best, y, float(torch.tensor(strength)))
    assert gap.max() < GAP[torch.float32]


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.1, 3.0])
def test_settling_prunes_what_the_prox_makes_two_sparse_and_nothing_else(strength):
    y = hard_groups(50_000, seed=27).float().cuda()
    w = settle_24(y, strength)
    whole = (prox_24(y.double(), float(torch.tensor(strength))) != 0).sum(-1) <= 2
    assert ((w == y) | (w == 0)).all()
    wrong = ((w != 0).sum(-1) <= 2) != whole
    assert wrong.float().mean() < 1e-4  # at the jump float32 may take either side


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_many_weights_together_in_one_launch_a_kind():
    y = hard_groups(6000, seed=28).clamp(-30, 30).float().cuda()
    weights = [y[:4096].reshape(128, 128), y[4096:5120].reshape(64, 64), y[5120:].reshape(-1, 32)]
    weights += [weights[1].T.contiguous(), weights[0].bfloat16()]
    strengths = torch.tensor([0.2, 0.5, 0.9, 1.3, 0.7], device="cuda")
    dims = [-1, 1, -1, 0, -1]
    scales = [None, None, torch.linspace(0.3, 3, 32, device="cuda"), None, None]
    want = [prox_24(w, s, dim=d, scale=c) for w, s, d, c in zip(weights, strengths, dims, scales, strict=True)]
    mine = [weight.clone() for weight in weights]
    prox = MultiTensorProx()
    prox(mine, strengths, dims, scales)
    assert prox.launches == 4
    for got, expected in zip(mine, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prox(mine, strengths, dims, scales)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prox(mine, strengths, dims, scales)
    for weight, start in zip(mine, weights, strict=True):
        weight.copy_(start)
    graph.replay()
    for got, expected in zip(mine, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="weight 1 cannot go with the others"):
        prox([mine[0], mine[1].double()], strengths[:2], [-1, -1], [None, None])


@pytest.mark.parametrize("settle", [False, True])
def test_statistics_of_the_same_pass_are_those_of_a_pass_of_their_own(settle):
    from prox24_lightning.prox.triton.statistics_pass import group_sums

    y = hard_groups(60_000, seed=29).clamp(-30, 30).float().cuda()
    weights = [y[:32768].reshape(256, 512), y[32768:49152].reshape(512, 128), y[49152:].reshape(-1, 32).bfloat16()]
    dims, scales = [1, 0, -1], [torch.linspace(0.3, 3, 512, device="cuda"), None, None]
    mine, plain, prox = [w.clone() for w in weights], [w.clone() for w in weights], MultiTensorProx()
    codes = [None, None, None]
    for strengths in (torch.tensor([0.3, 0.7, 1.1], device="cuda"), torch.tensor([0.5, 0.9, 1.2], device="cuda")):
        assert MultiTensorProx()(plain, strengths, dims, scales, settle=settle) == []
        found = prox(mine, strengths, dims, scales, settle=settle, previous_codes=codes)
        for one, weight, want, dim, scale, before in zip(found, mine, plain, dims, scales, codes, strict=True):
            torch.testing.assert_close(weight, want, rtol=1e-2, atol=1e-4)  # bfloat16 may be rounded the other way
            sums, code = group_sums(weight, dim=dim, scale=scale)
            assert torch.equal(one.code.movedim(dim, -1).flatten(), code)
            torch.testing.assert_close(one.sums[:9], sums, rtol=1e-4, atol=1e-3)
            assert torch.equal(one.sums[4:9], sums[4:9])
            if before is not None:
                assert one.sums[9] == flipped_entries(before, one.code)
        codes = [one.code for one in found]


def test_compiled():
    y = torch.randn(64, 64, device="cuda")
    step = torch.compile(lambda w, s: prox_24(w, s) * 2, fullgraph=True)
    assert torch.equal(step(y, torch.tensor(0.5, device="cuda")), prox_24(y, 0.5) * 2)


def test_in_place_and_without_a_copy():
    y = torch.randn(1024, 1024, device="cuda")
    want = prox_24(y, 0.5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prox_24(y, torch.tensor(0.5, device="cuda"), out=y)
    assert torch.cuda.max_memory_allocated() - before <= 1024
    assert torch.equal(y, want)


def test_special_values():
    nan, inf = torch.nan, torch.inf
    y = torch.tensor([[1, nan, 2, 3], [inf, -inf, inf, 1], [0.75, -0.75, 0.75, -0.75]], device="cuda")
    w = prox_24(y, 2.0).cpu()
    assert bool(w[0].isnan().all())
    assert torch.equal(w[1:], torch.tensor([[inf, -inf, 0, 0], [0.75, -0.75, 0, 0]]))
    assert torch.equal(prox_24(y, 0.0)[1:], y[1:])
    assert bool(prox_24(y, torch.tensor(-1.0, device="cuda")).isnan().all())
    assert bool(prox_24(y, 1.0, scale=torch.tensor([1.0, 1, 1, 0], device="cuda")).isnan().all())
    tiny = torch.tensor([[10, 1e-40, -1e-40, 0], [1e-40, 1e-40, 1e-40, 1e-40]], device="cuda")
    assert torch.equal(prox_24(tiny, torch.inf).cpu() != 0, torch.tensor([[True, True, False, False]] * 2))
    pruned = prox_24(-torch.rand(64, 64, device="cuda"), 30.0)
    assert not torch.signbit(pruned[pruned == 0]).any()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_no_host_synchronisation_and_cuda_graphs():
    y = torch.randn(256, 256, device="cuda")
    strength = torch.tensor(0.5, device="cuda")
    out = prox_24(y, strength)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prox_24(y, strength, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prox_24(y, strength, out=out)
    strength.fill_(1.5)
    graph.replay()
    assert torch.equal(out, prox_24(y, 1.5))


def test_other_inputs_take_the_batched_path():
    y = torch.randn(64, 64, device="cuda")
    assert prox_path(y.double()) == "batched"
    assert prox_path(y[:, ::2]) == "batched"
    assert "float64" in (why_batched(y.double()) or "")
    assert "contiguous" in (why_batched(y[:, ::2]) or "")
    # The two halves of a chunked answer: each ends at the optimum.
    best = prox_24(y.double(), 0.5)
    torch.testing.assert_close(prox_24(y.T, 0.5, dim=0).T, best.float(), rtol=2e-4, atol=2e-5)
    groups = [part.cpu().reshape(-1, 4) for part in (prox_24(y, 0.5), best, y)]
    assert relative_gap(*groups, 0.5).max() < GAP[torch.float32]
