"""Training with a transposable mask on packed weights: the products and their gradients, here with stand-in kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.convert.kernels.packed_buffer import from_buffer, to_buffer
from prox24_lightning.convert.layers.transposable_linear import (
    PackedPair,
    Products,
    TransposableForward,
    _Product,
    gather_values,
    why_not,
)
from prox24_lightning.mask import mask_24


def masked_weight(shape=(64, 128), dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    mask = mask_24(weight, dim=(0, 1))
    return weight * mask, mask


def stand_in(shape):
    """The product that a kernel would make of a buffer, by the dense weight inside."""

    def run(rows, buffer, dense, bias):
        return F.linear(
            rows, unpack_24(from_buffer(buffer, shape, rows.dtype)), None if bias is None else bias.to(rows)
        )

    return run


@pytest.mark.parametrize("transposed", [False, True])
def test_gathered_values_are_those_of_packing(transposed):
    weight, _ = masked_weight()
    turned = weight.t().contiguous() if transposed else weight
    packed = pack_24(turned.bfloat16())
    buffer = to_buffer(packed)
    wanted = buffer.clone()
    buffer.view(-1)[: packed.values.numel()].fill_(-1)
    gather_values(weight, packed.indices, buffer.view(torch.bfloat16), transposed=transposed)
    assert torch.equal(buffer, wanted)


def test_the_packed_pair_follows_the_weight():
    weight, mask = masked_weight()
    pair = PackedPair(weight, mask, torch.bfloat16)
    for step in range(2):
        for buffer, matrix in ((pair.buffer, weight), (pair.transposed_buffer, weight.t())):
            unpacked = unpack_24(from_buffer(buffer, tuple(matrix.shape), torch.bfloat16))
            assert torch.equal(unpacked, matrix.bfloat16()), step
        weight.mul_(2).add_(mask * 0.5)  # as an optimizer does: in place
        pair.refresh(weight)


def test_the_packed_pair_notices_another_tensor_of_the_same_version():
    weight, mask = masked_weight()
    pair = PackedPair(weight, mask, torch.bfloat16)
    other = weight * 2
    assert other._version == weight._version
    pair.refresh(other)
    assert torch.equal(unpack_24(from_buffer(pair.buffer, (64, 128), torch.bfloat16)), other.bfloat16())


def test_a_second_derivative_is_refused():
    weight, mask = masked_weight()
    rows = torch.randn(8, 128, dtype=torch.bfloat16, requires_grad=True)
    made = Products(stand_in((64, 128)), stand_in((128, 64)))
    pair = PackedPair(weight, mask, torch.bfloat16)
    out = _Product.apply(rows, weight, None, pair, made)
    (gradient,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_layer(bias):
    weight, mask = masked_weight()
    linear = nn.Linear(128, 64, bias=bias)
    linear.weight.data.copy_(weight)
    rows = torch.randn(24, 128, dtype=torch.bfloat16, requires_grad=True)
    made = Products(stand_in((64, 128)), stand_in((128, 64)))
    pair = PackedPair(linear.weight, mask, torch.bfloat16)
    out = _Product.apply(rows, linear.weight, linear.bias, pair, made)
    seed = torch.randn(out.shape, dtype=out.dtype)
    out.backward(seed)
    found = [rows.grad, *(parameter.grad for parameter in linear.parameters())]

    again = rows.detach().clone().requires_grad_()
    dense = nn.Linear(128, 64, bias=bias)
    dense.load_state_dict(linear.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_out = dense(again)
    expected_out.backward(seed)
    torch.testing.assert_close(out, expected_out)
    expected = [again.grad, *(parameter.grad for parameter in dense.parameters())]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_without_a_gpu_the_layer_stays_what_it_was():
    weight, mask = masked_weight()
    linear = nn.Linear(128, 64)
    linear.weight.data.copy_(weight)
    x = torch.randn(3, 5, 128)
    before = linear(x)
    sparse = TransposableForward(linear, mask)
    sparse.attach()
    assert torch.equal(linear(x), before)
    sparse.remove()
    assert torch.equal(linear(x), before)


def test_why_a_layer_cannot_train_so():
    weight, mask = masked_weight()
    assert why_not(weight, mask) is None
    assert "multiples of 64" in (why_not(weight[:32], mask[:32]) or "")
    row = mask_24(torch.randn(64, 128))
    assert "geometry='block'" in (why_not(weight, row) or "")
    with pytest.raises(ValueError, match="two of every four along the outputs"):
        TransposableForward(nn.Linear(128, 64), row)
