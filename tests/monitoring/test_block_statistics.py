"""Looks at weights in the block geometry, and the strength that makes a share of their blocks 2:4."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.mask import is_24, transposable_mask
from prox24_lightning.mask.codes import mask_picture
from prox24_lightning.monitoring.statistics import measure_sparsity
from prox24_lightning.prox import prox_24
from prox24_lightning.sparsify import strength_for_fraction
from prox24_lightning.weights.blocks_4x4 import to_blocks
from prox24_lightning.weights.selection import select_weights

BOTH = (0, 1)


def blocked(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return select_weights(nn.Sequential(layer), geometry="block").chosen


def random(seed=0, shape=(16, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_groups_of_both_directions_are_counted():
    weight = torch.zeros(4, 4)
    weight[0] = 1.0
    whole, _ = measure_sparsity(blocked(weight))
    assert whole.groups == 8
    assert whole.zeros == (1 / 8, 0, 0, 4 / 8, 3 / 8), "one full row; every column has one entry"
    assert whole.sparsity == 12 / 16
    assert whole.rms == pytest.approx(0.5)


def test_retained_squared_norm_and_flips_are_those_of_the_transposable_mask():
    weight, seen = random(), {}
    mask = transposable_mask(weight)
    first, _ = measure_sparsity(blocked(weight), last_masks=seen)
    assert first.retained_squared_norm == pytest.approx(float((weight * mask).square().sum() / weight.square().sum()))
    other = random(1)
    second, _ = measure_sparsity(blocked(other), last_masks=seen)
    assert second.mask_flips == pytest.approx(float((mask != transposable_mask(other)).float().mean()))
    done, _ = measure_sparsity(blocked(weight * mask))
    assert (done.groups_24, done.retained_squared_norm) == (1.0, 1.0)


def test_the_metric_decides_what_is_kept():
    weight, scale = random(), torch.linspace(0.1, 3.0, 24)
    mask = transposable_mask(weight, scale=scale)
    whole, _ = measure_sparsity(blocked(weight), scale_of=lambda name: scale)
    kept = (weight * scale * mask).square().sum() / (weight * scale).square().sum()
    assert whole.retained_squared_norm == pytest.approx(float(kept))


def test_nan_is_reported_and_not_raised():
    weight = random()
    weight[0, 0] = torch.nan
    whole, _ = measure_sparsity(blocked(weight))
    assert whole.retained_squared_norm != whole.retained_squared_norm
    assert mask_picture(weight, dim=BOTH).shape == (16, 24)


def test_the_picture_shows_the_corner_as_it_lies():
    weight = random()
    weight[3, 5] = 0.0
    expected = (weight != 0) * (1 + transposable_mask(weight).int())
    assert torch.equal(mask_picture(weight, dim=BOTH).int(), expected)
    assert torch.equal(mask_picture(weight, dim=(1, 0)).int(), expected.T)
    assert mask_picture(weight, dim=BOTH, rows=6, columns=9).shape == (4, 8)
    kernel = torch.stack([weight, random(1)], -1)
    assert torch.equal(mask_picture(kernel, dim=BOTH).int(), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(64, 96), (16, 32, 3, 3)])
def test_the_wanted_share_of_blocks_is_projected_and_the_rest_left_alone(fraction, shape):
    weight = random(shape=shape)
    strength, applied = strength_for_fraction(weight, fraction, dim=BOTH)
    result = prox_24(weight, applied, dim=BOTH)
    turned = to_blocks(result).ne(to_blocks(weight)).any(0).any(0)
    assert turned.float().mean() == pytest.approx(fraction, abs=0.01)
    assert is_24(to_blocks(result)[:, :, turned], dim=0) or not turned.any()
    assert torch.isfinite(strength)
    if fraction == 1.0:
        assert is_24(result, dim=BOTH)
