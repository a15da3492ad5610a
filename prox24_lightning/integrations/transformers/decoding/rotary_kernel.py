"""The rotary embedding of one token's queries and keys by one launch, with Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.integrations.transformers.decoding import early_start
from prox24_lightning.integrations.transformers.decoding.early_start import start_early


@triton.jit
def _rotate(
    query,
    key,
    cosine,
    sine,
    new_query,
    new_key,
    heads,
    groups,
    query_row,
    query_head,
    key_row,
    key_head,
    cosine_row,
    sine_row,
    HALF: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = tl.arange(0, WIDTH)
    inside = entry < HALF
    if head < heads:
        source = query + row * query_row + head * query_head
        target = new_query + (row * heads + head) * (2 * HALF)
    else:
        source = key + row * key_row + (head - heads) * key_head
        target = new_key + (row * groups + head - heads) * (2 * HALF)
    low = tl.load(source + entry, mask=inside, other=0.0)
    high = tl.load(source + HALF + entry, mask=inside, other=0.0)
    cosine += row * cosine_row + entry
    sine += row * sine_row + entry
    # Rounded after each step, as transformers does.
    first = _times(low, tl.load(cosine, mask=inside, other=0.0))
    second = _times(-high, tl.load(sine, mask=inside, other=0.0))
    tl.store(target + entry, (first.to(tl.float32) + second.to(tl.float32)).to(low.dtype), mask=inside)
    first = _times(high, tl.load(cosine + HALF, mask=inside, other=0.0))
    second = _times(low, tl.load(sine + HALF, mask=inside, other=0.0))
    tl.store(target + HALF + entry, (first.to(tl.float32) + second.to(tl.float32)).to(low.dtype), mask=inside)


@triton.jit
def _times(x, y):
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys with the rotary embedding of LLaMA, bit for bit as torch computes it step by step.

    Args:
        query: (batch, heads, 1, features), features next to each other, float16 or bfloat16.
        key: (batch, key-value heads, 1, features), likewise.
        cosine, sine: (batch, 1, features), likewise.
    """
    batch, heads, _, features = query.shape
    groups, half = key.shape[1], features // 2
    found = query.new_empty(query.shape), key.new_empty(key.shape)
    with torch.cuda.device(query.device):
        _rotate[batch, heads + groups](
            query,
            key,
            cosine,
            sine,
            *found,
            heads,
            groups,
            *query.stride()[:2],
            *key.stride()[:2],
            cosine.stride(0),
            sine.stride(0),
            HALF=half,
            WIDTH=triton.next_power_of_2(half),
            num_warps=1,
            enable_fp_fusion=False,  # a product and a sum in one instruction would be rounded once
            **early_start.settings(query.device),
        )
    return found
