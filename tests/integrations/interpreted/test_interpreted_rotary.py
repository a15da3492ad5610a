"""The Triton kernel of the rotary embedding, against transformers' function."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prox24_lightning.integrations.transformers.decoding import rotary_kernel


@pytest.mark.parametrize("features", [16, 24])
@pytest.mark.parametrize("batch", [1, 3])
def test_queries_and_keys_are_rotated(monkeypatch, batch, features):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    torch.manual_seed(0)
    joined = torch.randn(batch, 1, 6 * features).half()  # four heads of queries, two of keys
    query = joined[..., : 4 * features].view(batch, 1, 4, features).transpose(1, 2)
    key = joined[..., 4 * features :].view(batch, 1, 2, features).transpose(1, 2)
    cosine, sine = torch.randn(2, batch, 1, features).half()
    found = rotary_kernel.rotate(query, key, cosine, sine)
    for one, other in zip(found, apply_rotary_pos_emb(query, key, cosine, sine), strict=True):
        assert torch.equal(one, other)
