"""Rows rounded to 8 bits: the grid and the scale by hand, exact expansion, the fixed point, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_lightning.convert.format.packed_weight import pack_24, packed_bytes, unpack_24
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import (
    LARGEST,
    SMALLEST_SCALE,
    expand_rows,
    round_rows,
    round_values,
    rounded_form,
    row_scales,
)

FORMS = ("fp8_e4m3", "int8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pruned(rows, columns, dtype=torch.float32, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * size
    return (weight * mask_24(weight)).to(dtype)


def test_int8_by_hand():
    rounded = round_rows(torch.tensor([[12.7, -0.26, 0.1, 0.04]]), "int8")
    assert rounded.values.tolist() == [[127, -3, 1, 0]]
    assert rounded.scales.tolist() == pytest.approx([0.1], rel=2**-15)


def test_fp8_by_hand():
    """Three bits of mantissa: 17 lies between 16 and 18, 19 between 18 and 20; ties go to the even one."""
    rounded = round_rows(torch.tensor([[448.0, -17.0, 19.0, 2**-10]]), "fp8_e4m3")
    assert rounded.values.float().tolist() == [[448.0, -16.0, 20.0, 0.0]]
    assert rounded.scales.tolist() == [1.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_at_most_half_a_step(form, dtype):
    weight = pruned(32, 64, dtype)
    rounded = round_rows(weight, form)
    quotients = weight.float() / rounded.scales.unsqueeze(-1)
    error = (rounded.values.float() - quotients).abs()
    bound = 0.5 if form == "int8" else torch.maximum(quotients.abs() / 16, torch.tensor(2.0**-10))
    assert bool((error <= bound * 1.001).all())
    assert rounded.values.float().abs().amax(-1).tolist() == [LARGEST[form]] * 32


@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-40, 1e-32, 1e-7, 3e-4, 1.0, 60.0, 1e30]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_rounding_a_rounded_weight_changes_nothing(form, dtype, size, seed):
    weight = pruned(8, 40, torch.float32, size, seed).to(dtype)
    if not weight.isfinite().all():
        weight = weight.nan_to_num(1.0, 1.0, 1.0)
    packed = pack_24(weight, form=form)
    dense = unpack_24(packed)
    assert dense.dtype == dtype
    again = pack_24(dense, form=form)
    assert torch.equal(again.scales, packed.scales)
    assert torch.equal(again.indices, packed.indices)
    assert torch.equal(again.values.view(torch.int8), packed.values.view(torch.int8))
    assert torch.equal(unpack_24(again), dense)


@pytest.mark.parametrize("form", FORMS)
def test_expansion_is_exact_in_float32(form):
    weight = pruned(16, 64)
    rounded = round_rows(weight, form)
    exact = rounded.values.double() * rounded.scales.double().unsqueeze(-1)
    assert torch.equal(expand_rows(rounded.values, rounded.scales, torch.float32).double(), exact)
    assert torch.equal(unpack_24(pack_24(weight, form=form)).double(), exact)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_have_scale_one_and_tiny_rows_the_smallest_scale(form):
    weight = torch.zeros(3, 8)
    weight[1, 0] = 1e-36
    weight[2, 3] = 100 * SMALLEST_SCALE
    rounded = round_rows(weight, form)
    assert rounded.scales.tolist() == [1.0, 1.0, SMALLEST_SCALE]
    assert rounded.values.float()[2, 3] == (96 if form == "fp8_e4m3" else 100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4028234e38, 1e300])
def test_a_row_that_cannot_be_rounded_is_refused_with_layer_and_row(bad):
    weight = torch.zeros(3000, 1024, dtype=torch.float64)  # more than one chunk
    weight[2900, 5] = bad
    weight = weight if abs(bad) == 1e300 else weight.float()
    with pytest.raises(ValueError, match=r"layers\.0\.up: row 2900 holds NaN, inf or a value beyond float32.*dense"):
        pack_24(weight, form="int8", name="layers.0.up")


@pytest.mark.parametrize("form", FORMS)
def test_what_exceeds_the_range_is_clamped(form):
    found = round_values(torch.tensor([[1000.0, -1e30, 3.0]]), torch.ones(1), form)
    assert found.float().tolist() == [[LARGEST[form], -LARGEST[form], 3.0]]


def test_rounding_does_not_hide_a_third_entry():
    weight = torch.tensor([[100.0, 50.0, 1e-6, 0.0]])
    with pytest.raises(ValueError, match="up is not 2:4: 1 of 1 groups"):
        pack_24(weight, form="int8", name="up")


def test_an_entry_that_rounds_to_zero_is_packed_as_a_zero():
    packed = pack_24(torch.tensor([[0.0, 0.0, 100.0, 1e-6]]), form="int8")
    assert packed.values.tolist() == [[0, 127, 0, 0]]
    assert packed.indices.tolist() == [[0b01_00_10_00]]


def test_the_size_is_five_bits_a_weight_and_a_scale_a_row():
    packed = pack_24(pruned(32, 1024, torch.bfloat16), form="fp8_e4m3")
    assert packed.nbytes == 32 * (1024 * 5 // 8 + 4) == packed_bytes((32, 1024), 1, rounded=True)
    assert packed.form == "fp8_e4m3"
    assert packed.dtype == torch.bfloat16


def test_only_wide_floats_are_rounded():
    with pytest.raises(TypeError, match=r"w: torch\.int8 cannot be packed, only torch\.float64, .*torch\.float16$"):
        pack_24(torch.zeros(4, 8, dtype=torch.int8), form="int8", name="w")
    with pytest.raises(TypeError, match=r"torch\.bfloat16 is not the dtype of a rounded form"):
        rounded_form(torch.bfloat16)


def test_rows_without_entries():
    assert row_scales(torch.zeros(3, 0), "int8").tolist() == [SMALLEST_SCALE] * 3
    assert unpack_24(pack_24(torch.zeros(3, 0), form="int8")).shape == (3, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_rounds_and_expands_as_the_cpu_does(form, dtype):
    weight = pruned(333, 400, dtype)
    here, there = pack_24(weight, form=form), pack_24(weight.cuda(), form=form)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there.indices.cpu(), here.indices)
    assert torch.equal(there.values.cpu().view(torch.int8), here.values.view(torch.int8))
    assert torch.equal(unpack_24(there).cpu(), unpack_24(here))
