from __future__ import annotations

import itertools

import pytest
import torch

from prox24_lightning.mask import (
    is_24,
    mask_24,
    pack_mask,
    transposable_mask,
    unpack_mask,
    violations_24,
)
from prox24_lightning.mask.transposable import best_patterns, transposable_patterns
from prox24_lightning.weights.blocks_4x4 import block_shape, from_blocks, per_block, to_blocks

CPU = torch.device("cpu")


def brute_masks() -> torch.Tensor:
    """All 4 x 4 masks of two ones in each row and column, found by looking at every set of eight entries."""
    found = []
    for entries in itertools.combinations(range(16), 8):
        mask = torch.zeros(16)
        mask[list(entries)] = 1
        if (mask.view(4, 4).sum(0) == 2).all() and (mask.view(4, 4).sum(1) == 2).all():
            found.append(mask)
    return torch.stack(found).double()


def test_masks_are_exact_against_brute_force_on_ten_thousand_blocks():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 400, generator=generator)
    scale = torch.rand(400, generator=generator) + 0.1
    mask = transposable_mask(weight, scale=scale)
    score = to_blocks((weight * scale).double().square()).flatten(0, 1).T
    assert len(score) == 10_000
    masks = brute_masks()
    assert len(masks) == 90
    best = masks[(score @ masks.T).argmax(1)]
    assert torch.equal(to_blocks(mask).flatten(0, 1).T.double(), best)


def test_the_maximal_masks_of_at_most_two_are_186():
    masks = transposable_patterns(CPU, at_most=True)
    assert len(masks) == 186
    assert len(transposable_patterns(CPU)) == 90
    assert ((masks.sum(1) <= 2).all() & (masks.sum(2) <= 2).all()).item()
    sizes = set()
    for bits in range(1 << 16):  # every mask of at most two lies inside one of them
        if bin(bits).count("1") in (7, 8):
            rows = [bits >> 4 * i & 15 for i in range(4)]
            if all(bin(row).count("1") <= 2 for row in rows) and all(
                sum(row >> j & 1 for row in rows) <= 2 for j in range(4)
            ):
                sizes.add(bits)
    ours = {int(sum(1 << i for i in range(16) if flat[i])) for flat in masks.flatten(1).tolist()}
    full = {bits for bits in sizes if bin(bits).count("1") == 8}
    maximal = full | {bits for bits in sizes - full if not any(bits & eight == bits for eight in full)}
    assert ours == maximal


@pytest.mark.parametrize(
    "shape, dims", [((8, 12), (0, 1)), ((8, 4, 3, 3), (0, 1)), ((12, 8), (1, 0)), ((3, 8, 4), (1, 2))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_two_stay_in_every_row_and_column_in_any_layout(shape, dims, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = transposable_mask(weight, dims=dims)
    assert mask.double().mean() == 0.5
    assert is_24(weight * mask, dim=dims)
    assert torch.equal(mask, mask_24(weight, dim=dims))
    assert torch.equal(unpack_mask(pack_mask(mask), shape), mask)


def test_the_transposed_weight_gets_the_transposed_mask():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(transposable_mask(weight).T, transposable_mask(weight.T))


def test_equal_scores_give_the_same_mask_whatever_the_size_of_the_scores():
    masks = [transposable_mask(torch.full((4, 4), value, dtype=torch.float64)) for value in (0.0, 0.1, 3e-200, 1e200)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0][0].tolist() == [True, True, False, False]


def test_any_score_can_be_maximised():
    score = torch.rand(4, 4, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    masks = brute_masks()
    best = masks[(masks @ score.flatten(0, 1)).argmax(0)].T.view(4, 4, 50)
    assert torch.equal(best_patterns(score).double(), best)


def test_an_infinite_weight_is_kept_and_nan_is_refused():
    weight = torch.ones(4, 4)
    weight[2, 3] = torch.inf
    assert transposable_mask(weight)[2, 3]
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 scores of a weight of shape"):
        transposable_mask(weight)


def test_violations_are_counted_along_both_dimensions():
    weight = torch.zeros(4, 8)
    weight[0, :3] = 1.0  # a row too full, no column
    weight[1:4, 7] = 2.0  # a column too full, no row
    found = violations_24(weight, dim=(0, 1))
    assert (found.count, found.groups) == (2, 16)
    assert found.first == ((0, 7), (0, 0))
    assert not is_24(weight, dim=(0, 1))
    assert not is_24(weight, dim=0)
    assert not is_24(weight, dim=1)


@pytest.mark.parametrize("shape, dims", [((8, 12), (0, 1)), ((4, 8, 3, 2), (0, 1)), ((8, 3, 4), (2, 0))])
def test_blocks_round_trip(shape, dims):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    blocks = to_blocks(weight, dims)
    assert torch.equal(from_blocks(blocks, shape, dims), weight)
    index = torch.arange(float(torch.Size(block_shape(shape, dims)).numel())).view(block_shape(shape, dims))
    spread = index
    for dim in dims:
        spread = spread.repeat_interleave(4, dim)
    assert torch.equal(to_blocks(spread, dims), per_block(index, shape, dims).expand(4, 4, -1))


@pytest.mark.parametrize(
    "shape, dims, words",
    [
        ((8, 6), (0, 1), "size 6, which does not divide by 4"),
        ((8, 8), (1, -1), "two different dimensions"),
        ((8, 8), (0, 2), "out of range"),
    ],
)
def test_bad_blocks_are_refused(shape, dims, words):
    with pytest.raises(ValueError, match=words):
        transposable_mask(torch.ones(shape), dims=dims)
