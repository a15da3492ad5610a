"""The Triton kernel that gathers kept entries, against its reference in plain torch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.kernels.gather import kernel, reference
from prox24_lightning.mask import mask_24


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (72, 200), (136, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_gathers_what_the_reference_gathers(monkeypatch, transposed, shape, dtype):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    torch.manual_seed(0)
    mask = mask_24(torch.randn(shape), dim=(0, 1))
    weight = torch.randn(shape) * mask
    packed = pack_24((mask.t() if transposed else mask).to(dtype).contiguous())
    expected, found = (torch.full(packed.values.shape, torch.nan, dtype=dtype) for _ in range(2))
    reference.gather(weight, packed.indices, expected, transposed)
    kernel.gather(weight, packed.indices, found, transposed)
    assert torch.equal(found, expected)
