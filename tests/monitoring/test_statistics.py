"""Numbers of a measure_sparsity, against weights worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prox24_lightning.mask import mask_24
from prox24_lightning.mask.codes import flipped_entries, mask_picture, top_two_code
from prox24_lightning.monitoring.statistics import measure_sparsity, weight_sums
from prox24_lightning.weights.groups import to_groups
from prox24_lightning.weights.selection import select_weights


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def chosen(*layers):
    return select_weights(nn.Sequential(*layers)).chosen


HAND = linear([[1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 3.0]])
"""One group each with 0, 2, 1 and 3 zeros."""


def test_groups_by_number_of_zeros():
    whole, _ = measure_sparsity(chosen(HAND))
    assert whole.zeros == (0.25, 0.25, 0.25, 0.25, 0.0)
    assert whole.groups_24 == 0.5
    assert whole.sparsity == (0 + 2 + 1 + 3) / 16


def test_retained_squared_norm_by_the_top_two():
    whole, _ = measure_sparsity(chosen(HAND))
    assert whole.retained_squared_norm == pytest.approx((25 + 2 + 8 + 9) / (30 + 2 + 12 + 9))


def test_energy_of_a_24_weight_is_kept_exactly():
    weight = torch.randn(64, 64)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = weight * mask_24(weight)
    assert measure_sparsity(chosen(layer))[0].retained_squared_norm == 1.0


def test_scale_of_the_weights():
    assert measure_sparsity(chosen(HAND))[0].rms == pytest.approx(math.sqrt(53 / 16))


def test_penalty_is_relative_to_the_weights_scale():
    whole, _ = measure_sparsity(chosen(HAND))
    assert whole.penalty == pytest.approx(((6 + 24 + 12 + 8) + 8) / 4 / (53 / 16) ** 1.5)
    larger = linear((1000 * HAND.weight.detach()).tolist())
    assert measure_sparsity(chosen(larger))[0].penalty == pytest.approx(whole.penalty)


def test_penalty_of_a_gaussian_weight_is_near_two():
    layer = nn.Linear(512, 256, bias=False)
    nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    assert measure_sparsity(chosen(layer))[0].penalty == pytest.approx(4 * (2 / math.pi) ** 1.5, rel=0.02)


def test_the_metric_scales_what_counts_but_not_the_weights_size():
    layer = linear([[1.0, 1.0, 1.0, 2.0]])
    scale = torch.tensor([[3.0, 2.0, 1.0, 0.0625]])
    whole, _ = measure_sparsity(chosen(layer), scale_of=lambda name: scale)
    assert whole.retained_squared_norm == pytest.approx(13 / (14 + 1 / 64))
    assert whole.rms == pytest.approx(math.sqrt(7 / 4))


def test_strength_of_the_model_is_the_median_of_the_layers():
    weights = chosen(*(nn.Linear(4, 4) for _ in range(4)))
    strengths = {weights[i].name: torch.tensor(float(i)) for i in (0, 1, 3)}
    whole, layers = measure_sparsity(weights, strengths=strengths)
    assert whole.strength == 1.0
    assert [layer.strength for layer in layers.values()] == [0.0, 1.0, None, 3.0]


def test_no_strength_yet():
    assert measure_sparsity(chosen(HAND))[0].strength is None


def test_mask_flips_since_the_last_look():
    layer = linear([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    weights, seen = chosen(layer), {}
    assert measure_sparsity(weights, last_masks=seen)[0].mask_flips is None
    layer.weight.data[0, 0] = 5.0  # {3, 4} becomes {1, 4}: two entries change
    assert measure_sparsity(weights, last_masks=seen)[0].mask_flips == 2 / 8
    assert measure_sparsity(weights, last_masks=seen)[0].mask_flips == 0.0


def test_flips_are_not_counted_across_the_first_scale():
    weights, seen = chosen(HAND), {}
    measure_sparsity(weights, last_masks=seen)
    scale = torch.rand(1, 8) + 0.5
    assert measure_sparsity(weights, scale_of=lambda name: scale, last_masks=seen)[0].mask_flips is None
    assert measure_sparsity(weights, scale_of=lambda name: scale, last_masks=seen)[0].mask_flips == 0.0


def test_the_whole_weighs_layers_by_their_groups():
    dense, empty = linear([[1.0, 1.0, 1.0, 1.0]] * 3), linear([[0.0, 0.0, 0.0, 0.0]])
    whole, layers = measure_sparsity(chosen(dense, empty))
    assert whole.groups_24 == 0.25
    assert layers["1.weight"].retained_squared_norm == 1.0
    assert layers["1.weight"].penalty == 0.0
    assert whole.penalty == pytest.approx(0.75 * 4)


def test_one_group_in_a_million_shows():
    weight = torch.zeros(1000, 4000)
    weight[17, 40:43] = 1.0
    sums, _ = weight_sums(weight)
    assert sums[4:].tolist() == [0, 1, 0, 0, 999_999]
    layer = nn.Linear(4000, 1000, bias=False)
    layer.weight.data = weight
    assert measure_sparsity(chosen(layer))[0].groups_24 < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    layer = nn.Linear(8, 2, bias=False, dtype=dtype)
    layer.weight.data = HAND.weight.detach().to(dtype)
    assert measure_sparsity(chosen(layer))[0] == measure_sparsity(chosen(HAND))[0]


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 6, 3), nn.Conv1d(16, 4, 2, groups=2)])
def test_convolutions_group_along_their_input_channels(layer):
    layer.weight.data[:, 0:2] = 0
    (weight,) = chosen(layer)
    flat = layer.weight.detach().movedim(1, -1).flatten(0, -2)
    linear_layer = nn.Linear(flat.shape[1], flat.shape[0], bias=False)
    linear_layer.weight.data = flat.contiguous()
    whole, reference = measure_sparsity([weight])[0], measure_sparsity(chosen(linear_layer))[0]
    assert whole.zeros == reference.zeros
    assert (whole.retained_squared_norm, whole.penalty, whole.rms) == pytest.approx(
        (reference.retained_squared_norm, reference.penalty, reference.rms)
    )
    assert whole.zeros[2] > 0


def test_nan_is_reported_and_not_raised():
    layer = linear([[math.nan, 1.0, 0.0, 0.0]])
    whole, _ = measure_sparsity(chosen(layer))
    assert math.isnan(whole.rms)
    assert whole.groups_24 == 1.0


def test_codes_follow_the_rule_of_mask_24_ties_included():
    weight = torch.randint(-2, 3, (4000, 4)).float()
    code = top_two_code(weight.abs().t().contiguous())
    mask = (code.unsqueeze(-1) >> torch.arange(4, dtype=torch.uint8)) & 1
    assert torch.equal(mask.bool(), to_groups(mask_24(weight)).squeeze(-2))


def test_flipped_entries_of_all_pairs_of_masks():
    codes = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=torch.uint8)
    for a in codes:
        for b in codes:
            assert flipped_entries(a[None], b[None]).item() == bin(int(a) ^ int(b)).count("1")


def test_mask_picture():
    weight = torch.tensor([[4.0, -3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 5.0], [0.0] * 8])
    assert mask_picture(weight).tolist() == [[2, 2, 1, 0, 0, 0, 0, 2], [0] * 8]
    assert mask_picture(weight, rows=1, columns=4).tolist() == [[2, 2, 1, 0]]
    assert mask_picture(weight.t(), dim=0).tolist() == [[2, 2, 1, 0, 0, 0, 0, 2], [0] * 8]
    assert mask_picture(weight, scale=torch.tensor([1.0, 1.0, 9.0, 1.0] * 2)).tolist()[0][:4] == [2, 1, 2, 0]


def test_one_read_from_the_device_for_all_layers(monkeypatch):
    weights = chosen(*(nn.Linear(8, 8) for _ in range(6)))
    seen = {}
    strengths = {weight.name: torch.tensor(1.0) for weight in weights}
    measure_sparsity(weights, strengths=strengths, last_masks=seen)
    reads = []
    for method in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, method)

        def spy(self, *args, method=method, original=original, **kwargs):
            reads.append(method)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, spy)
    measure_sparsity(weights, strengths=strengths, last_masks=seen)
    assert reads == ["tolist"]
