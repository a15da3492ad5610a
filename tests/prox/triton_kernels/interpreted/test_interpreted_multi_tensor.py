"""One launch for many weights gives what a launch for each gives, statistics of the same pass included."""

from __future__ import annotations

import torch

from prox24_lightning.mask.codes import flipped_entries
from prox24_lightning.prox import MultiTensorProx, prox_24
from prox24_lightning.prox.triton.launch import critical_24_triton
from prox24_lightning.prox.triton.statistics_pass import group_sums


def test_every_weight_gets_its_own_prox(many):
    weights, dims, scales, strengths = many
    mine = [weight.clone() for weight in weights]
    prox = MultiTensorProx()
    prox(mine, strengths, dims, scales)
    assert prox.launches == 3
    for got, weight, strength, dim, scale in zip(mine, weights, strengths, dims, scales, strict=True):
        torch.testing.assert_close(got, prox_24(weight, strength, dim=dim, scale=scale), rtol=2e-4, atol=2e-4)


def test_scales_that_have_changed_are_taken_over(many):
    weights, dims, scales, strengths = many
    prox = MultiTensorProx()
    prox([weight.clone() for weight in weights], strengths, dims, scales)
    for change in (lambda scale: scale.flip(0), lambda scale: scale.mul_(2.0)):  # another tensor, the same in place
        scales[0] = change(scales[0])
        mine = [weight.clone() for weight in weights]
        prox(mine, strengths, dims, scales)
        want = prox_24(weights[0], strengths[0], dim=dims[0], scale=scales[0])
        torch.testing.assert_close(mine[0], want, rtol=2e-4, atol=2e-4)


def test_statistics_of_the_same_pass(many):
    weights, dims, scales, strengths = many
    prox, codes = MultiTensorProx(), [None, None, None]
    for now in (strengths, torch.tensor([0.5, 0.9, 1.2])):
        found = prox(weights, now, dims, scales, previous_codes=codes)
        for one, weight, dim, scale, before in zip(found, weights, dims, scales, codes, strict=True):
            sums, code = group_sums(weight, dim=dim, scale=scale)
            assert torch.equal(one.code.movedim(dim, -1).flatten(), code)
            assert torch.equal(one.sums[4:9], sums[4:])
            torch.testing.assert_close(one.sums[:9], sums, rtol=1e-4, atol=1e-4)
            assert before is None or one.sums[9] == flipped_entries(before, one.code)
        codes = [one.code for one in found]


def test_the_sample_meets_every_column_evenly(many):
    weight = torch.tensor([1.0, 0.9, 0.8, 0.7]).repeat(64, 16)
    weight *= torch.where(torch.arange(64) // 4 % 4 == 0, 100.0, 1.0)  # every fourth group of a row
    sampled = MultiTensorProx().critical([weight], [1], [None], 256)
    assert (sampled < 0.1).float().mean() == 0.25


def test_sampled_critical_strengths_are_those_of_groups_of_the_weight(many):
    weights, dims, scales, _ = many
    sampled = MultiTensorProx().critical(weights, dims, scales, 64)
    for row, weight, dim, scale in zip(sampled, weights, dims, scales, strict=True):
        assert torch.isin(row, critical_24_triton(weight, dim=dim, scale=scale)).all()
