"""Attention of one new token a sequence over the filled part of a key-value cache, as one operator.

The number of filled positions lies on the device, so that one CUDA graph serves every length. Grouped keys are read as
they are (transformers repeats them). On a GPU torch's flash kernel does the work where it takes such lengths; elsewhere
two matrix products do.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, library

NAME = "prox24_decode"
"""Under which transformers knows this attention. A name with "flash" in it would send transformers to the hub."""

_TOLERANCE = 0.02  # of bfloat16 outputs of size 1 or so
_KEPT_STARTS: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}


def reference(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    """:func:`decode_attention` in plain torch."""
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * tokens, -1)
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    position = torch.arange(key.shape[2], device=key.device)
    scores = scores.masked_fill(position >= filled.view(-1, 1, 1, 1), -math.inf)
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.view(batch, heads, tokens, -1).transpose(1, 2)


@library.custom_op("prox24::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    """Softmax attention of the newest token over the first ``filled`` positions of each sequence.

    Args:
        query: (batch, heads, 1, features).
        key, value: (batch, key-value heads, capacity, features), views of tensors laid out as (batch, capacity,
            key-value heads, features).
        filled: int32 (batch,) or any shape of as many entries, at least 1.
        scale: of the scores.

    Returns:
        (batch, 1, heads, features).
    """
    if query.is_cuda and _flash_works(query.device.index, query.dtype, query.shape[-1]):
        return _flash(query, key, value, filled, scale)
    return reference(query, key, value, filled, scale).contiguous()


@decode_attention.register_fake
def _shape_only(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, features = query.shape
    return query.new_empty(batch, tokens, heads, features)


def _flash(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, features = query.shape
    capacity, groups = key.shape[2], key.shape[1]
    query_starts, key_starts = _starts(batch, tokens, capacity, query.device)
    found = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2).reshape(batch * tokens, heads, features),
        key.transpose(1, 2).reshape(batch * capacity, groups, features),
        value.transpose(1, 2).reshape(batch * capacity, groups, features),
        query_starts,
        key_starts,
        tokens,
        capacity,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=filled.reshape(-1),
    )
    return found[0].view(batch, tokens, heads, features)


def _starts(batch: int, tokens: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the sequences begin among the queries and among the keys: int32 (batch + 1,), made once and kept."""
    key = batch, tokens, capacity, device
    if (kept := _KEPT_STARTS.get(key)) is not None:
        return kept
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    made = starts * tokens, starts * capacity
    if not torch.cuda.is_current_stream_capturing():  # a graph has to fill what it allocates
        _KEPT_STARTS[key] = made
    return made


@lru_cache
def _flash_works(device: int, dtype: torch.dtype, features: int) -> bool:
    """Whether this torch's flash kernel heeds the filled lengths: tried once on small tensors."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.is_current_stream_capturing():
        return False
    generator = torch.Generator(device=f"cuda:{device}").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=f"cuda:{device}").to(dtype)

    query = draw(2, 8, 1, features)
    key, value = (draw(2, 96, 2, features).transpose(1, 2) for _ in range(2))
    filled = torch.tensor([5, 77], dtype=torch.int32, device=f"cuda:{device}")
    try:
        difference = _flash(query, key, value, filled, features**-0.5) - reference(
            query, key, value, filled, features**-0.5
        )
    except (RuntimeError, TypeError):
        return False
    return bool(difference.abs().max() < _TOLERANCE)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; ``attention_mask`` is the (batch, 1, 1, 1) count of filled positions."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query, key, value, attention_mask, scale), None
