from __future__ import annotations

import pytest
import torch

from prox24_lightning.mask import check, is_24, mask_24, violations_24, zeros_per_group


def test_zeros_are_counted_group_by_group():
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0]])
    assert zeros_per_group(weight).tolist() == [[2, 1]]
    assert zeros_per_group(weight.t(), dim=0).tolist() == [[2], [1]]


def test_a_projected_weight_passes_and_one_more_value_fails():
    weight = torch.randn(4, 8, 3, 3)
    weight = weight * mask_24(weight, dim=1)
    assert is_24(weight, dim=1)
    weight[2, 4:7, 1, 0] = 1.0
    assert not is_24(weight, dim=1)


def test_violations_are_located_in_the_weights_own_coordinates():
    weight = torch.zeros(4, 8, 3)
    weight[2, 4:8, 1] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    weight[3, 0:4, 2] = 7.0
    found = violations_24(weight, dim=1)
    assert (found.count, found.groups) == (2, 24)
    assert found.first == ((2, 4, 1), (3, 0, 2))
    assert found.values == ((1.0, 2.0, 3.0, 0.0), (7.0, 7.0, 7.0, 7.0))
    assert "2 of 24 groups" in str(found)
    assert "(2, 4, 1): 1, 2, 3, 0" in str(found)


def test_only_the_first_violations_are_listed():
    assert len(violations_24(torch.ones(10, 8), limit=3).first) == 3
    assert violations_24(torch.ones(10, 8), limit=3).count == 20


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("limit", [0, 3, 5000])
def test_part_by_part_the_same_is_found(dim, limit, monkeypatch):
    weight = torch.randn(16, 12, 8, generator=torch.Generator().manual_seed(0)).relu()
    whole = violations_24(weight, dim=dim, limit=limit)
    assert 0 < whole.count < whole.groups == weight.numel() // 4
    assert len(whole.first) == min(limit, whole.count)
    clean = weight * mask_24(weight, dim=dim)
    monkeypatch.setattr(check, "ENTRIES_AT_A_TIME", 500)
    assert violations_24(weight, dim=dim, limit=limit) == whole
    assert is_24(clean, dim=dim)
    clean[-1, -1, -1] = clean[-2, -2, -2] = 1.0
    clean[-4:, -4:, -4:] = 1.0
    assert not is_24(clean, dim=dim)


def test_no_violation_is_falsy():
    found = violations_24(torch.zeros(2, 4))
    assert not found
    assert str(found) == "all 2 groups are 2:4"


def test_nan_is_not_a_zero():
    assert not is_24(torch.full((1, 4), float("nan")))


def test_a_bad_dim_is_refused():
    with pytest.raises(ValueError, match="does not divide by 4"):
        is_24(torch.zeros(4, 6))
