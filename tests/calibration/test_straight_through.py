"""The rounding inside a forward pass is that of a packed weight to the bit, and no gradient sees it."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.calibration import straight_through
from prox24_lightning.calibration.straight_through import round_inputs, round_matrix
from prox24_lightning.weights.chunks import CHUNK_ENTRIES
from prox24_lightning.weights.rounding import expand_rows, round_rows, round_tokens, round_weight

FORMS = ["fp8_e4m3", "int8"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def odd_rows(dtype, rows=7, columns=12):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] *= 1e-7  # subnormal in float16
    weight[2] *= 1e4
    weight[3, 4:] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_rounded_as_it_is_packed(dtype, form):
    weight = odd_rows(dtype)
    assert torch.equal(round_matrix(weight, form, dtype), round_weight(weight, form))
    rows = round_rows(weight, form)
    assert torch.equal(round_matrix(weight, form, torch.float32), expand_rows(rows.values, rows.scales, torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_rounded_as_the_kernels_round_tokens(form, monkeypatch):
    inputs = torch.stack([odd_rows(torch.bfloat16), odd_rows(torch.bfloat16) * 3])
    rows = round_tokens(inputs.reshape(-1, 12), form)
    wanted = expand_rows(rows.values, rows.scales, torch.float32).view(2, 7, 12)
    assert torch.equal(round_inputs(inputs, form, torch.float32), wanted)
    assert torch.equal(round_inputs(inputs.mT.contiguous().mT, form, torch.float32), wanted)
    assert torch.equal(round_inputs(inputs[0, 0], form, torch.float32), wanted[0, 0])  # a token without a batch
    monkeypatch.setattr(straight_through, "_INPUT_CHUNK", 36)
    assert torch.equal(round_inputs(inputs, form, torch.float32), wanted)
    assert round_inputs(inputs[:0], form, torch.float32).shape == (0, 7, 12)


def test_a_large_weight_is_rounded_in_parts():
    weight = torch.randn(3, CHUNK_ENTRIES // 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_matrix(weight, "int8", torch.float32), round_weight(weight, "int8"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_cannot_be_rounded_becomes_nan_and_no_other(form, bad):
    weight = odd_rows(torch.bfloat16)
    weight[4, 5] = bad
    for rounded in (round_matrix(weight, form, torch.float32), round_inputs(weight, form, torch.float32)):
        assert rounded[4].isnan().all()
        assert rounded[[0, 1, 2, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("round_it", [round_matrix, round_inputs])
def test_gradients_pass_straight_through_in_the_dtype_of_what_was_rounded(form, round_it):
    weight = odd_rows(torch.float32).requires_grad_()
    gradient = torch.randn(7, 12).bfloat16()
    found = round_it(weight, form, torch.bfloat16, torch.bfloat16)
    assert torch.equal(found, round_it(weight.detach().bfloat16(), form, torch.bfloat16))
    found.backward(gradient)
    assert torch.equal(weight.grad, gradient.float())
    weight.grad = None
    exact = torch.randn(7, 12)
    round_it(weight, form, torch.float32, torch.bfloat16).backward(exact)  # no gradient is rounded on its way
    assert torch.equal(weight.grad, exact)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_code_rounds_to_the_same_bits_in_one_graph(form):
    def product(weight, inputs):
        return (
            round_inputs(inputs, form, torch.bfloat16) @ round_matrix(weight, form, torch.bfloat16, torch.bfloat16).t()
        )

    weight, inputs = odd_rows(torch.float32), odd_rows(torch.bfloat16)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    results = []
    for function in (product, compiled):
        leaf = weight.clone().requires_grad_()
        out = function(leaf, inputs)
        out.float().square().sum().backward()
        results.append((out.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_the_gpu_rounds_to_the_bits_of_the_cpu_compiled_or_not(form):
    weight, inputs = odd_rows(torch.float32, 64, 96), odd_rows(torch.bfloat16, 200, 96)
    wanted = (
        round_matrix(weight, form, torch.bfloat16, torch.bfloat16),
        round_inputs(inputs, form, torch.bfloat16),
    )

    def both(weight, inputs):
        return round_matrix(weight, form, torch.bfloat16, torch.bfloat16), round_inputs(inputs, form, torch.bfloat16)

    for function in (both, torch.compile(both, fullgraph=True)):
        found = function(weight.cuda(), inputs.cuda())
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_rounds_in_one_pass_as_a_cpu_does(dtype, form):
    weight = odd_rows(torch.float32, 64, 5000) * torch.logspace(-6, 2, 64)[:, None]
    for given in (weight.to(dtype), weight):
        for function in (round_matrix, round_inputs):
            right = function(given, form, dtype, dtype)
            found = function(given.cuda(), form, dtype, dtype).cpu()
            assert torch.equal(found, right)
            assert torch.equal(found.signbit(), right.signbit())
