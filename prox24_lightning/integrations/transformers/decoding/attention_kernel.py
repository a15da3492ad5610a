"""Attention of one new token a sequence over the filled part of a cache, with Triton: by parts, and then their sum.

The queries that share a key-value head are the rows of one product. Each program takes a part of the filled positions,
so that a few sequences occupy the device as well; a second kernel weighs the parts by their softmax sums.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.integrations.transformers.decoding import early_start
from prox24_lightning.integrations.transformers.decoding.early_start import start_early

_PROGRAMS = 512
"""Programs at most, as far as parts make them: some for each multiprocessor of the largest GPUs."""
_MOST_PARTS = 16
_LEAST_ROWS = 16  # of a product on tensor cores


@triton.jit
def _attend(
    query,
    key,
    value,
    filled,
    sums,
    statistics,
    scale,
    groups,
    query_row,
    query_head,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    MEMBERS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    FEATURES: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    row, group, part = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups, tl.program_id(1)
    length = tl.load(filled + row)
    size = tl.cdiv(tl.cdiv(length, PARTS), TOKENS) * TOKENS
    begin = part * size
    end = tl.minimum(length, begin + size)
    member, feature = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = group * MEMBERS + member
    wide = (feature < FEATURES)[None, :]
    real = (member < MEMBERS)[:, None] & wide
    q = tl.load(query + row * query_row + head[:, None] * query_head + feature[None, :], mask=real, other=0.0)
    keys = key + row * key_row + group * key_head + feature[None, :]
    values = value + row * value_row + group * value_head + feature[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < end
        here = inside[:, None] & wide
        k = tl.load(keys + token[:, None].to(tl.int64) * key_token, mask=here, other=0.0)
        v = tl.load(values + token[:, None].to(tl.int64) * value_token, mask=here, other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(top - higher)
        total = total * fading + tl.sum(weights, 1)
        mixed = mixed * fading[:, None] + tl.dot(weights.to(v.dtype), v)
        top = higher
    place = (row * groups * MEMBERS + head) * PARTS + part
    tl.store(sums + place[:, None] * FEATURES + feature[None, :], mixed, mask=real)
    tl.store(statistics + 2 * place, top, mask=member < MEMBERS)
    tl.store(statistics + 2 * place + 1, total, mask=member < MEMBERS)


@triton.jit
def _combine(
    sums,
    statistics,
    out,
    FEATURES: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    head = tl.program_id(0).to(tl.int64)
    place, feature = head * PARTS + tl.arange(0, PARTS), tl.arange(0, WIDTH)
    wide = feature < FEATURES
    top = tl.load(statistics + 2 * place)
    weight = tl.exp2(top - tl.max(top, 0))  # 0 for a part without tokens
    total = tl.sum(weight * tl.load(statistics + 2 * place + 1), 0)
    mixed = tl.load(sums + place[:, None] * FEATURES + feature[None, :], mask=wide[None, :], other=0.0)
    found = tl.sum(mixed * weight[:, None], 0) / total
    tl.store(out + head * FEATURES + feature, found.to(out.dtype.element_ty), mask=wide)


def attention(query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scale: float) -> Tensor:
    """As :func:`~prox24_lightning.integrations.transformers.decoding.decode_attention.decode_attention`, on a GPU.

    float16 and bfloat16, one token a sequence, features of keys, values and queries next to each other in memory.
    """
    batch, heads, _, features = query.shape
    groups = key.shape[1]
    pairs = batch * groups
    parts = triton.next_power_of_2(max(1, min(_MOST_PARTS, _PROGRAMS // pairs)) + 1) // 2
    sums = torch.empty(batch * heads * parts * features, dtype=torch.float32, device=query.device)
    statistics = torch.empty(batch * heads * parts * 2, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, 1, heads, features, dtype=query.dtype, device=query.device)
    members, width = heads // groups, triton.next_power_of_2(features)
    rows = max(_LEAST_ROWS, triton.next_power_of_2(members))
    early = early_start.settings(query.device)
    with torch.cuda.device(query.device):
        _attend[pairs, parts](
            query,
            key,
            value,
            filled,
            sums,
            statistics,
            scale * math.log2(math.e),
            groups,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            MEMBERS=members,
            ROWS=rows,
            FEATURES=features,
            WIDTH=max(_LEAST_ROWS, width),
            PARTS=parts,
            TOKENS=64,
            num_warps=4,
            **early,
        )
        _combine[(batch * heads,)](
            sums,
            statistics,
            out,
            FEATURES=features,
            WIDTH=max(_LEAST_ROWS, width),
            PARTS=parts,
            num_warps=2,
            **early,
        )
    return out
