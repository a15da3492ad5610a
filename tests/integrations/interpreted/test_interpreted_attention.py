"""The Triton kernels of attention while decoding, against their reference in plain torch."""

from __future__ import annotations

from contextlib import nullcontext

import numpy
import pytest
import torch
import triton
from packaging.version import Version

from prox24_lightning.integrations.transformers.decoding import attention_kernel
from prox24_lightning.integrations.transformers.decoding.decode_attention import reference


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 makes no loops of tensors with this numpy",
)
@pytest.mark.parametrize("features", [16, 24])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2), (20, 1)])
@pytest.mark.parametrize("programs", [4, 512])
def test_the_kernels_compute_what_the_reference_computes(monkeypatch, programs, heads, groups, features):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(attention_kernel, "_PROGRAMS", programs)
    torch.manual_seed(0)
    query = torch.randn(3, 1, heads, features).half().transpose(1, 2)
    key, value = (torch.randn(3, 210, groups, features).half().transpose(1, 2) for _ in range(2))
    filled = torch.tensor([1, 65, 210], dtype=torch.int32)
    for row, length in enumerate(filled.tolist()):
        key[row, :, length:] = value[row, :, length:] = torch.nan  # what is not filled is not read
    found = attention_kernel.attention(query, key, value, filled, 0.3)
    for row, length in enumerate(filled.tolist()):
        one = [tensor[row : row + 1, :, :length] for tensor in (key, value)]
        expected = reference(query[row : row + 1].float(), *(part.float() for part in one), filled[row : row + 1], 0.3)
        torch.testing.assert_close(found[row : row + 1].float(), expected, rtol=5e-3, atol=5e-3)
