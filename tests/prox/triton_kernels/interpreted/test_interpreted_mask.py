"""The kernel that zeroes pruned entries from packed bits."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.mask import pack_mask
from prox24_lightning.mask.triton_kernel import zero_pruned_triton


@pytest.mark.parametrize("mostly_zero", [False, True])
@pytest.mark.parametrize("values", [torch.randn(501, 4), torch.randn(7, 3).bfloat16()])
def test_pruned_entries_become_positive_zero(values, mostly_zero):
    values = values.clone()
    mask = torch.rand(values.shape) < 0.5
    want = torch.where(mask, values, 0.0)
    zero_pruned_triton(values, pack_mask(mask), mostly_zero=mostly_zero)
    assert torch.equal(values, want)
    assert not torch.signbit(values[~mask]).any()
