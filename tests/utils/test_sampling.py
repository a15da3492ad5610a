"""The sample meets every row and every column of a matrix, whatever its shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prox24_lightning.utils.sampling import sample_stride, spread_sample


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_the_stride_is_coprime_and_about_as_long_as_asked_for(count, samples):
    stride = sample_stride(count, samples)
    assert math.gcd(stride, count) == 1
    assert max(count // samples, 1) <= stride <= max(count // samples, 1) + 32


@pytest.mark.parametrize("rows, columns", [(512, 512), (96, 2240), (500, 300), (1024, 1 << 10), (65, 65 * 16)])
def test_every_column_is_met_as_often_as_the_others(rows, columns):
    samples = columns * 4
    column = torch.arange(columns).expand(rows, columns)
    found = spread_sample(column, samples).bincount(minlength=columns)
    assert (found.min(), found.max()) == (4, 4)


def test_few_values_are_all_taken():
    values = torch.arange(6).view(2, 3)
    assert spread_sample(values, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread_sample(values, 100).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread_sample(torch.empty(0), 4).numel() == 0
