"""The times of layers, dense and packed, from the kernel cache of this machine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path

import torch

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.kernel_table import BUCKETS
from prox24_lightning.convert.autotune.time_kernels import Shape


def layer_times(
    shapes: Mapping[str, Shape],
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    measure: bool = False,
    cache: Path | None = None,
) -> dict[str, tuple[float, float]]:
    """Return microseconds of each layer's product, dense and by the fastest packed kernel, on the current GPU.

    Args:
        shapes: name -> (out_features, in_features).
        tokens: rows of the input; the next number that kernels are measured at counts.
        dtype: of weights and inputs.
        measure: measure what the cache does not hold, and add it.
        cache: its file; None takes the default one.

    Returns:
        by name; empty where there is no GPU, or a time is not known: times of some layers alone compare nothing.
    """
    if not torch.cuda.is_available():
        return {}
    count = BUCKETS[min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]
    if measure:
        from prox24_lightning.convert.autotune.tune import kernel_tables

        kernel_tables(list(shapes.values()), dtype, token_counts=(count,), cache=cache)
    entries = disk_cache.read(cache or disk_cache.default_path())
    machine = disk_cache.Machine.here(torch.cuda.current_device())
    found = {}
    for name, shape in shapes.items():
        entry = entries.get(disk_cache.key(machine, dtype, shape, count))
        if entry is None or not entry.kernels:
            return {}
        found[name] = (entry.dense_us, min(entry.dense_us, *entry.kernels.values()))
    return found
