"""A key-value cache of fixed size, written at each sequence's own position."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class FixedCache:
    """Keys and values of every layer in tensors of fixed size, written at each sequence's own position."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.position = torch.zeros(batch, dtype=torch.long, device=device)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def fill(self, cache: Any, lengths: Sequence[int]) -> None:
        """Take the tokens of a prompt, without the padding on their left; waits for no device."""
        if not self._layers:
            for layer in cache.layers:
                self._layers.append(tuple(self._empty(part) for part in (layer.keys, layer.values)))  # type: ignore[arg-type]
        for mine, layer in zip(self._layers, cache.layers, strict=True):
            for kept, part in zip(mine, (layer.keys, layer.values), strict=True):
                if len(set(lengths)) == 1:
                    kept[:, : lengths[0]] = part[:, :, part.shape[2] - lengths[0] :].transpose(1, 2)
                    continue
                for row, length in enumerate(lengths):
                    kept[row, :length] = part[row, :, part.shape[2] - length :].transpose(0, 1)
        for row, length in enumerate(lengths):
            self.position[row] = length

    def _empty(self, part: Tensor) -> Tensor:
        batch, heads, _, features = part.shape
        return part.new_zeros(batch, self.capacity, heads, features)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches: (batch, heads, 1, features) in, all positions out."""
        kept_keys, kept_values = self._layers[layer_idx]
        write(kept_keys, kept_values, keys, values, self.position)
        return kept_keys.transpose(1, 2), kept_values.transpose(1, 2)

    def get_seq_length(self, *args: Any) -> int:
        """Positions are handed to the model, so that none has to be counted here."""
        return 0


def write(kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """Write one key and value of each sequence and head into a cache, by one launch on a GPU with Triton.

    Args:
        kept_keys, kept_values: (batch, capacity, heads, features), contiguous.
        keys, values: (batch, heads, 1, features), any strides, in the dtype of the cache.
        position: int64 (batch,), below the capacity.
    """
    same = keys.dtype == kept_keys.dtype and values.dtype == kept_values.dtype
    if keys.is_cuda and same and _kernel_works(keys.device.index, keys.dtype):
        from prox24_lightning.integrations.transformers.decoding import cache_kernel

        cache_kernel.write(kept_keys, kept_values, keys, values, position)
    else:
        write_reference(kept_keys, kept_values, keys, values, position)


def write_reference(kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    """:func:`write` in plain torch, on any device."""
    rows = torch.arange(len(position), device=position.device)
    kept_keys[rows, position] = keys[:, :, 0]
    kept_values[rows, position] = values[:, :, 0]


@lru_cache
def _kernel_works(device: int, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel runs here and writes what it should: tried once on small tensors."""
    if torch.cuda.is_current_stream_capturing():
        return False
    place = torch.device("cuda", device)
    position = torch.tensor([3, 0], device=place)
    keys = torch.arange(2 * 2 * 8, device=place).to(dtype).view(2, 1, 2, 8).transpose(1, 2)
    given = keys, keys + 1, position
    found, expected = ([torch.zeros(2, 4, 2, 8, dtype=dtype, device=place) for _ in range(2)] for _ in range(2))
    try:
        from prox24_lightning.integrations.transformers.decoding import cache_kernel

        cache_kernel.write(found[0], found[1], *given)
        write_reference(expected[0], expected[1], *given)
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            raise RuntimeError("it writes something else")
    except Exception as error:  # of Triton's compiler, which is not installed everywhere and needs another
        log.warning("keys and values are written by two kernels instead of one: %s", error)
        return False
    return True
