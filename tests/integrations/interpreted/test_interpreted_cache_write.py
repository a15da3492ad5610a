"""The Triton kernel that writes keys and values into a cache, against its reference in plain torch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from prox24_lightning.integrations.transformers.decoding import cache, cache_kernel


@pytest.mark.parametrize("features", [(8, 8), (24, 16), (5, 12)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_kernel_writes_what_the_reference_writes(monkeypatch, batch, features):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    torch.manual_seed(0)
    position = torch.tensor([5, 0, 3])[:batch]
    # As a model makes them: views of one product, heads behind tokens; and keys with strides of their own.
    keys = torch.randn(batch, features[0], 2, 1).permute(0, 2, 3, 1)
    values = torch.randn(batch, 1, 40)[..., 3 : 3 + 2 * features[1]].view(batch, 1, 2, -1).transpose(1, 2)
    expected = [torch.full((batch, 6, 2, size), torch.nan) for size in features]
    found = [kept.clone() for kept in expected]
    cache.write_reference(*expected, keys, values, position)
    cache_kernel.write(*found, keys, values, position)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert expected[0].isfinite().sum() == batch * 2 * features[0]
