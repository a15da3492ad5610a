"""The operator of a packed product. No GPU needed."""

from __future__ import annotations

import torch

from prox24_lightning.convert.layers import linear_op


def test_only_so_many_numbers_of_tokens_stay_prepared(monkeypatch):
    monkeypatch.setattr(linear_op, "prepare", lambda *arguments: arguments)
    for tokens in range(1, 5001):
        linear_op._prepared("8=dense", torch.float16, 64, 64, tokens, 0)
    kept = linear_op._prepared.cache_info().currsize
    linear_op._prepared.cache_clear()
    assert kept == linear_op._PREPARED < 5000
