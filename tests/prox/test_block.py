from __future__ import annotations

import itertools

import pytest
import torch

from prox24_lightning.mask import is_24, mask_24, transposable_mask
from prox24_lightning.mask.transposable import best_patterns, relative_squares
from prox24_lightning.prox import block_convergence, penalty_24, prox_24, prox_block
from prox24_lightning.prox.block import block_objective, descend
from prox24_lightning.weights.blocks_4x4 import block_shape, to_blocks

METHODS = ["dykstra", "averaged", "descent"]


def gaussian(rows=32, columns=48, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def objective(found, weight, strength):
    return block_objective(to_blocks(found).abs(), to_blocks(weight).abs(), torch.as_tensor(strength))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [0.05, 0.3, 1.0, 5.0])
def test_no_block_ends_worse_than_its_projection_or_the_weight_itself(method, strength):
    weight = gaussian()
    found = objective(prox_block(weight, strength, method=method), weight, strength)
    eight = objective(weight * transposable_mask(weight), weight, strength)
    keep = best_patterns(relative_squares(to_blocks(weight)), at_most=True)
    seven = block_objective(to_blocks(weight).abs() * keep, to_blocks(weight).abs(), torch.tensor(strength))
    assert (found <= eight * (1 + 1e-12)).all()
    assert (found <= seven * (1 + 1e-12)).all()
    assert (seven <= eight * (1 + 1e-12)).all()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("strength", [0.05, 0.3, 1.0, 5.0])
def test_no_row_or_column_prox_ends_worse_than_its_projection(dim, strength):
    weight = gaussian()

    def value(w):
        moved = 0.5 * (w - weight).square().unflatten(dim, (-1, 4)).sum(dim + 1)
        return moved + strength * penalty_24(w, dim=dim, reduce="none")

    projected = value(weight * mask_24(weight, dim=dim))
    assert (value(prox_24(weight, strength, dim=dim)) <= projected * (1 + 1e-12)).all()


def test_the_splitting_is_close_to_the_best_of_many_descents():
    weight = gaussian(40, 40, seed=1)
    y = to_blocks(weight).abs().contiguous()
    strength = torch.full((y.shape[2],), 0.3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    starts = [y * torch.rand(y.shape, generator=generator, dtype=torch.float64) for _ in range(8)]
    best = torch.stack(
        [block_objective(descend(start, y, strength, prox_24, 8), y, strength) for start in starts]
    ).amin(0)
    found = objective(prox_block(weight, 0.3, steps=20, sweeps=10), weight, 0.3)
    assert (found <= best * (1 + 1e-6)).double().mean() > 0.9
    assert found.sum() <= 1.002 * best.sum()


def test_descent_never_raises_the_objective():
    y = to_blocks(gaussian(seed=3)).abs().contiguous()
    strength = torch.linspace(0.1, 2.0, y.shape[2], dtype=torch.float64)
    w, last = y.clone(), block_objective(y, y, strength)
    for _ in range(4):
        w = descend(w, y, strength, prox_24, 1)
        now = block_objective(w, y, strength)
        assert (now <= last * (1 + 1e-12)).all()
        last = now


def test_strength_zero_is_the_identity_and_infinity_projects_with_survivors_untouched():
    weight = gaussian(dtype=torch.float32)
    assert torch.equal(prox_block(weight, 0.0), weight)
    projected = prox_block(weight, float("inf"))
    assert is_24(projected, dim=(0, 1))
    assert torch.equal(projected, torch.where(projected != 0, weight, 0.0))
    lost = (weight - projected).square().sum()
    assert lost <= (weight - weight * transposable_mask(weight)).square().sum()


def test_a_transposable_weight_is_a_fixed_point():
    weight = gaussian(dtype=torch.float32)
    weight = weight * transposable_mask(weight)
    for strength in (0.1, 10.0):
        assert torch.equal(prox_block(weight, strength), weight)


def test_signs_scale_dims_and_strengths_a_block():
    weight = gaussian(16, 24, seed=4)
    scale = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5
    strength = torch.rand(block_shape(weight.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = prox_block(weight, strength, scale=scale)
    torch.testing.assert_close(found, prox_block(weight * scale, strength) / scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(prox_block(-weight, strength, scale=scale), -found, rtol=0, atol=0)
    torch.testing.assert_close(prox_24(weight, strength, dim=(0, 1), scale=scale), found, rtol=0, atol=0)
    one = prox_block(weight[4:8, 8:12], float(strength[1, 2]), scale=scale[8:12])
    torch.testing.assert_close(found[4:8, 8:12], one, rtol=1e-12, atol=1e-15)


def test_convolutions_are_cut_at_every_kernel_position():
    weight = gaussian(8, 4 * 9).view(8, 4, 3, 3)
    found = prox_block(weight, 0.5)
    for i, j in itertools.product(range(3), range(3)):
        torch.testing.assert_close(found[:, :, i, j], prox_block(weight[:, :, i, j].contiguous(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    weight = gaussian(dtype=dtype)
    out = torch.empty_like(weight)
    assert prox_block(weight, 0.4, out=out) is out
    assert torch.equal(out, prox_block(weight.float(), 0.4).to(dtype))


def test_a_block_with_nan_comes_back_as_nan_and_no_other():
    weight = gaussian(8, 8)
    weight[0, 0] = torch.nan
    found = prox_block(weight, 0.5)
    assert found[:4, :4].isnan().all()
    assert not found[4:].isnan().any()


def test_the_penalty_of_blocks_is_that_of_rows_and_columns():
    weight = gaussian(8, 12)
    values = penalty_24(weight, dim=(0, 1), reduce="none")
    assert values.shape == (2, 3)
    expected = penalty_24(weight, dim=0) + penalty_24(weight, dim=1)
    torch.testing.assert_close(values.sum(), expected)
    torch.testing.assert_close(penalty_24(weight, dim=(0, 1)), expected)
    torch.testing.assert_close(values[1, 2], penalty_24(weight[4:, 8:], dim=(0, 1)))


def test_dykstra_converges_and_says_so():
    blocks = to_blocks(gaussian())
    trace = block_convergence(blocks, 0.1, steps=40)
    assert len(trace.objective) == 40
    assert trace.change[-1] < 1e-6 < trace.change[0]
    assert trace.disagreement[-1] < 1e-6
    averaged = block_convergence(blocks, 0.1, method="averaged", steps=40)
    assert averaged.change[-1] < averaged.change[0]
    assert trace.objective[-1] <= averaged.objective[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "newton"}, "method='newton' is unknown"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"strength": -1.0}, "strength=-1.0 must be >= 0"),
        ({"dims": (1, 1)}, "two different dimensions"),
        ({"strength": torch.ones(8, 1)}, "does not broadcast against the groups' shape"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        prox_block(gaussian(8, 8), **{"strength": 1.0, **arguments})


def test_descent_has_no_splitting_to_trace():
    with pytest.raises(ValueError, match="no splitting to trace"):
        block_convergence(to_blocks(gaussian(8, 8)), 0.1, method="descent")


@pytest.mark.gpu
def test_the_fused_kernels_give_the_same_blocks():
    weight = gaussian(64, 64, dtype=torch.float32)
    for method in METHODS:
        ours, theirs = prox_block(weight, 0.4, method=method), prox_block(weight.cuda(), 0.4, method=method).cpu()
        gap = objective(theirs, weight, 0.4) - objective(ours, weight, 0.4)
        assert gap.abs().max() < 1e-4
