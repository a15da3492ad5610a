"""The rounding of tokens in plain torch, which the kernel is compared with on a GPU. No GPU needed."""

from __future__ import annotations

import math

import pytest
import torch

from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.kernels import nvrtc, reference
from prox24_lightning.convert.kernels.round_tokens.kernel import compile_round_tokens
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.kernels.rounded_buffer import to_buffer
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import LARGEST

FORMS = ["fp8_e4m3", "int8"]


@pytest.mark.parametrize("form", FORMS)
def test_each_token_uses_the_whole_range(form):
    inputs = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e4, 1e-3]).unsqueeze(-1)
    found = round_tokens(inputs, form)
    assert found.values.float().abs().amax(-1).eq(LARGEST[form]).all()
    error = (found.values.float() * found.scales.unsqueeze(-1) - inputs).abs()
    assert (error <= inputs.abs() / 16 + found.scales.unsqueeze(-1) * (0.5 if form == "int8" else 2**-10)).all()


def test_by_hand():
    found = round_tokens(torch.tensor([[127.0, -63.5, 0.4, 0.6]]), "int8")
    assert found.values.tolist() == [[127, -64, 0, 1]]
    assert found.scales.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form):
    found = round_tokens(torch.zeros(2, 8), form)
    assert not found.values.float().any()
    assert found.scales.gt(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_token_with_nan_or_inf_has_products_of_nan(form, bad, scale):
    inputs = torch.randn(3, 8)
    inputs[1, 2] = bad
    found = round_tokens(inputs, form, scale)
    products = (found.values.float().sum(-1)) * found.scales
    assert products.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("form", FORMS)
def test_a_given_scale_clamps(form):
    found = round_tokens(torch.tensor([[1e6, 0.5, -1e6, 0.0]]), form, 0.25)
    assert found.values.float().tolist() == [[LARGEST[form], 2, -LARGEST[form], 0]]
    assert found.scales.tolist() == [0.25]


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_product_is_close_to_the_dense_one(form):
    weight = torch.randn(100, 200)
    weight *= mask_24(weight)
    inputs = torch.randn(9, 200)
    buffer = to_buffer(pack_24(weight, form=form))
    found = reference.linear(inputs, buffer, torch.ones(100), torch.float32, (100, 200), form)
    expected = inputs @ weight.t() + 1
    assert (found - expected).norm() < (0.06 if form == "fp8_e4m3" else 0.02) * expected.norm()
    assert (
        torch.equal(reference.expand(buffer, (100, 200), torch.float32, form) != 0, weight.abs() > 0) or form == "int8"
    ), "small values may become zeros in int8 alone"


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
def test_the_kernel_compiles_for_every_gpu_that_has_the_form():
    for form, capability in (("int8", (8, 0)), ("int8", (8, 6)), ("fp8_e4m3", (8, 9)), ("fp8_e4m3", (9, 0))):
        for dtype in (torch.float16, torch.bfloat16):
            assert compile_round_tokens(form, dtype, capability)
