"""Attention of one new token a sequence over the filled part of a key-value cache, as one operator.

The number of filled positions lies on the device, so that one CUDA graph serves every length. Grouped keys are read as
they are (transformers repeats them). On a GPU torch's flash kernel does the work where it takes such lengths, or our
kernels in Triton, whichever is faster at a shape; elsewhere two matrix products do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, library

from prox24_lightning.convert.measurement import time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture

NAME = "prox24_decode"
"""Under which transformers knows this attention. A name with "flash" in it would send transformers to the hub."""

log = logging.getLogger(__name__)

_HARMLESS = frozenset({"dropout", "position_ids", "cache_position"})
"""Arguments of transformers' attention that say nothing to one token that sees all before it."""

Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

_CALLS, _ROUNDS = 20, 10  # of a measurement
_WAYS: dict[Any, Way] = {}
_TOLERANCE = 0.02  # of bfloat16 outputs of size 1 or so
_KEPT_STARTS: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}


class UnknownAttentionError(ValueError):
    """The attention of a model is not softmax over all filled positions."""


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
    return _way(query, key, value)(query, key, value, filled, scale)


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


def _kernel(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    from prox24_lightning.integrations.transformers.decoding import attention_kernel

    return attention_kernel.attention(query, key, value, filled, scale)


def _products(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    return reference(query, key, value, filled, scale).contiguous()


def _way(query: Tensor, key: Tensor, value: Tensor) -> Way:
    """The fastest implementation that works for tensors like these, chosen once; a capture measures nothing."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return _products
    alike = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and key.shape == value.shape
    form = query.device, query.dtype, query.shape, key.shape, alike
    if form in _WAYS:
        return _WAYS[form]
    if torch.cuda.is_current_stream_capturing():
        return _products
    both: tuple[Way, ...] = _flash, _kernel
    ways = [way for way in both if alike and _works(way, query.device, query.dtype, query.shape[-1])]
    _WAYS[form] = _fastest(ways, query, key, value) if ways else _products
    return _WAYS[form]


def _fastest(ways: list[Way], query: Tensor, key: Tensor, value: Tensor) -> Way:
    """The fastest way from a graph, half of the positions filled; the first if that cannot be measured."""
    if len(ways) == 1:
        return ways[0]
    filled = torch.full((len(query),), key.shape[2] // 2 + 1, dtype=torch.int32, device=query.device)

    def calls(way: Way) -> None:
        for _ in range(_CALLS):
            way(query, key, value, filled, 1.0)

    try:
        with torch.cuda.device(query.device):
            graphs = {way.__name__: capture(partial(calls, way)) for way in ways}
            times = time_calls({name: graph.replay for name, graph in graphs.items()}, calls=_CALLS, rounds=_ROUNDS)
    except Exception as error:  # of Triton, or no memory: either way works
        log.info("attention while decoding is not measured: %s", error)
        return ways[0]
    found = min(ways, key=lambda way: times[way.__name__].median_us)
    log.info("attention while decoding: %s", {name: f"{time.median_us:.1f} us" for name, time in times.items()})
    return found


@lru_cache
def _works(way: Way, device: torch.device, dtype: torch.dtype, features: int) -> bool:
    """Whether an implementation runs here and heeds the filled lengths: tried once on small tensors."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query = draw(2, 8, 1, features)
    key, value = (draw(2, 96, 2, features).transpose(1, 2) for _ in range(2))
    given = query, key, value, torch.tensor([5, 77], dtype=torch.int32, device=device), features**-0.5
    try:
        difference = way(*given) - reference(*given)
    except Exception as error:  # torch's kernel is not the same in every version, and Triton may not compile
        log.info("attention while decoding does not run as %s: %s", way.__name__, error)
        return False
    return bool(difference.abs().max() < _TOLERANCE)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; ``attention_mask`` is the (batch, 1, 1, 1) count of filled positions.

    Raises:
        UnknownAttentionError: for arguments that may change the scores (sinks, caps, biases, windows), or another mask.
    """
    harmless = (name for name, value in others.items() if value is None or isinstance(value, bool))
    unknown = others.keys() - _HARMLESS - set(harmless)
    if unknown:
        raise UnknownAttentionError(f"its attention takes {', '.join(sorted(unknown))}")
    if attention_mask.shape != (len(query), 1, 1, 1):
        raise UnknownAttentionError("it makes an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query, key, value, attention_mask, scale), None
