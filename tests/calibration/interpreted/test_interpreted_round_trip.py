"""The kernel rounds to the bit as plain torch does; without casts to bfloat16, which the interpreter truncates."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.calibration.rounding_kernel import round_trip
from prox24_lightning.weights.rounding import expand_rows, round_rows_unchecked, round_tokens

CASTS = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


def wide_rows(columns):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, columns, generator=generator) * torch.logspace(-9, 4, 9)[:, None]
    rows[0], rows[1, 3:], rows[2, ::2] = -0.0, 0, -0.0
    rows[3] *= torch.logspace(-8, 0, columns)
    return rows


def wanted(rows, form, dtype, tokens):
    rounded = round_tokens(rows, form) if tokens else round_rows_unchecked(rows, form)
    return expand_rows(rounded.values, rounded.scales, dtype)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("form", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize(("given", "source", "dtype"), CASTS)
def test_rounded_in_one_pass(given, source, dtype, form, tokens):
    rows = wide_rows(20).to(given)
    found = round_trip(rows, form, dtype, source, tokens=tokens)
    right = wanted(rows.to(source), form, dtype, tokens)
    assert torch.equal(found, right)
    assert torch.equal(found.signbit(), right.signbit())
    assert torch.equal(round_trip(rows.t().contiguous().t(), form, dtype, source, tokens=tokens), right)


def test_rows_longer_than_a_block():
    rows = wide_rows(4097)[4:6]
    assert torch.equal(
        round_trip(rows, "fp8_e4m3", torch.float32, torch.float32, tokens=False),
        wanted(rows, "fp8_e4m3", torch.float32, tokens=False),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_row_that_cannot_be_rounded_becomes_nan_and_no_other(bad):
    rows = wide_rows(20)[:3].clone()
    rows[1, 5] = bad
    found = round_trip(rows, "int8", torch.float32, torch.float32, tokens=True)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_no_rows():
    assert round_trip(torch.empty(0, 4), "int8", torch.float32, torch.float32, tokens=True).shape == (0, 4)
