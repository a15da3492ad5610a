"""The operator of a packed product. No GPU needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prox24_lightning.convert.layers import linear_op, semi_structured_linear
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear


def test_only_so_many_numbers_of_tokens_stay_prepared(monkeypatch):
    monkeypatch.setattr(linear_op, "prepare", lambda *arguments: arguments)
    for tokens in range(1, 5001):
        linear_op._prepared("8=dense", torch.float16, 64, 64, tokens, 0)
    kept = linear_op._prepared.cache_info().currsize
    linear_op._prepared.cache_clear()
    assert kept == linear_op._PREPARED < 5000


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 1, 6), (2, 3, 2, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("any_shape", [True, False])
def test_results_have_the_shape_of_the_input(monkeypatch, shape, any_shape):
    weight, seen = torch.randn(5, 6, dtype=torch.bfloat16), []

    def product(rows, buffer, dense, bias):
        seen.append(rows.shape)
        return F.linear(rows, weight)

    monkeypatch.setattr(linear_op, "_prepared", lambda *arguments: (product, 0, any_shape))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    x = torch.randn(shape, dtype=torch.bfloat16)
    found = linear_op.multiply(x, torch.empty(1), None, None, torch.bfloat16, 5, 6, "1=few")
    torch.testing.assert_close(found, F.linear(x, weight))
    if x.numel() and not any_shape:
        assert [len(one) for one in seen] == [2]


def test_a_call_looks_its_tensors_up_without_the_modules_own_search(monkeypatch):
    packed = torch.zeros(64, 36, dtype=torch.int16)
    layer = SemiStructuredLinear(packed, (64, 64), torch.bfloat16, torch.ones(64), "1=few")
    monkeypatch.setattr(SemiStructuredLinear, "_accepted", lambda self, x: x)
    monkeypatch.setattr(semi_structured_linear, "multiply", lambda x, packed, dense, bias, *rest: (packed, dense, bias))
    bias = layer.bias
    monkeypatch.setattr(torch.nn.Module, "__getattr__", lambda self, name: 1 / 0)
    found = layer.forward(torch.ones(1, 64, dtype=torch.bfloat16))
    assert found[0] is packed
    assert found[1] is None
    assert found[2] is bias
