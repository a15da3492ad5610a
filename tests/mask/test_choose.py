from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prox24_lightning.mask import is_24, mask_24, transposable_mask, violations_24
from prox24_lightning.prox import prox_block


def test_the_two_largest_of_four_stay():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.1]])
    expected = torch.tensor([[False, True, False, True], [True, False, False, True]])
    assert torch.equal(mask_24(weight), expected)


def test_equal_scores_keep_the_earlier_position():
    assert mask_24(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
    assert mask_24(torch.tensor([[1.0, 2.0, -1.0, 1.0]])).tolist() == [[True, True, False, False]]
    assert mask_24(torch.zeros(1, 4)).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape, dim", [((5, 8), 1), ((8, 5), 0), ((3, 8, 3, 2), 1)])
def test_exactly_two_stay_in_every_group_in_any_layout(dtype, shape, dim):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = mask_24(weight, dim=dim)
    assert mask.float().mean() == 0.5
    assert is_24(weight * mask, dim=dim)
    assert torch.equal(mask.movedim(dim, -1), mask_24(weight.movedim(dim, -1)))


def test_the_scale_is_part_of_the_score():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scale = torch.tensor([[10.0, 10.0, 1.0, 1.0]])
    assert mask_24(weight, scale=scale).tolist() == [[True, True, False, False]]


@given(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4))
def test_no_other_mask_keeps_more_energy(values):
    weight = torch.tensor([values], dtype=torch.float64)
    kept = (weight * mask_24(weight)).square().sum()
    best = max(sum(values[i] ** 2 for i in pair) for pair in itertools.combinations(range(4), 2))
    assert kept == pytest.approx(best, rel=1e-12)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 scores of a weight of shape"):
        mask_24(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]))


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_whole_graphs_hold_the_mask(dim, scaled):
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 2, 8) if scaled else None
    compiled = torch.compile(lambda w: w * mask_24(w, dim=dim, scale=scale), fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight), weight * mask_24(weight, dim=dim, scale=scale))


@pytest.mark.parametrize("function", [mask_24, is_24, violations_24, transposable_mask])
def test_numpy_arrays_and_vmap_are_refused_with_the_remedy(function):
    with pytest.raises(TypeError, match=r"takes a torch.Tensor, got numpy.ndarray; use torch.as_tensor"):
        function(np.zeros((8, 8), np.float32))
    with pytest.raises(TypeError, match="does not run under torch.vmap; call it on the stacked weights"):
        torch.vmap(function)(torch.randn(2, 8, 8))


@pytest.mark.parametrize("function", [transposable_mask, lambda weight, **dims: prox_block(weight, 100.0, **dims)])
def test_the_remedy_for_a_stack_of_matrices_is_each_matrix_alone(function):
    stack = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"with the dimensions of the matrices \(dims=\(1, 2\) for a stack"):
        torch.vmap(function)(stack)
    alone = torch.stack([function(matrix) for matrix in stack])
    assert torch.equal(function(stack, dims=(1, 2)), alone)
    assert not torch.equal(function(stack), alone)
    with pytest.raises(ValueError, match=r"dimension 0 .* has size 5, .* choose another dim or dims"):
        function(stack[:5])
