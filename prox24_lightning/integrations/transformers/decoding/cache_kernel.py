"""Write the newest key and value of each sequence into a cache of fixed size, both by one launch, with Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.integrations.transformers.decoding import early_start
from prox24_lightning.integrations.transformers.decoding.early_start import start_early


@triton.jit
def _write(
    keys,
    values,
    kept_keys,
    kept_values,
    position,
    capacity,
    key_features,
    value_features,
    key_row,
    key_head,
    key_feature,
    value_row,
    value_head,
    value_feature,
    FEATURES: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = (row * capacity + tl.load(position + row)) * tl.num_programs(1) + head
    feature = tl.arange(0, FEATURES)
    inside = feature < key_features
    found = tl.load(keys + row * key_row + head * key_head + feature * key_feature, mask=inside)
    tl.store(kept_keys + place * key_features + feature, found, mask=inside)
    inside = feature < value_features
    found = tl.load(values + row * value_row + head * value_head + feature * value_feature, mask=inside)
    tl.store(kept_values + place * value_features + feature, found, mask=inside)


def write(kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """As :func:`~prox24_lightning.integrations.transformers.decoding.cache.write_reference`, on a GPU."""
    batch, heads, _, key_features = keys.shape
    value_features = values.shape[3]
    with torch.cuda.device(keys.device):
        _write[batch, heads](
            keys,
            values,
            kept_keys,
            kept_values,
            position,
            kept_keys.shape[1],
            key_features,
            value_features,
            *(keys.stride(dim) for dim in (0, 1, 3)),
            *(values.stride(dim) for dim in (0, 1, 3)),
            FEATURES=triton.next_power_of_2(max(key_features, value_features)),
            num_warps=1,
            **early_start.settings(keys.device),
        )
