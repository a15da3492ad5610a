"""Read from the kernel cache what layers gained on this machine; nothing is measured here."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import torch

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import BUCKETS
from prox24_lightning.convert.doctor import Gain
from prox24_lightning.convert.eligibility import LayerVerdict


def measured_gain(machine: Machine, dtype: torch.dtype, *, cache: Path | None = None) -> Gain:
    """Return a function that looks up dense time over the time of the fastest packed kernel, by layer and tokens.

    A number of tokens that was not measured itself takes the next larger one of
    :data:`~prox24_lightning.convert.autotune.kernel_table.BUCKETS`, as a converted layer does.

    Args:
        machine: the GPU and the libraries, from :meth:`~prox24_lightning.convert.autotune.disk_cache.Machine.here`.
        dtype: of the weights.
        cache: the file; None takes the default one.
    """
    entries = disk_cache.read(cache or disk_cache.default_path())

    def gain(verdict: LayerVerdict, tokens: int) -> float | None:
        larger = BUCKETS[min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]
        for count in (tokens, larger):
            entry = entries.get(disk_cache.key(machine, dtype, (verdict.shape[0], verdict.shape[1]), count))
            if entry is not None and entry.kernels:
                return entry.dense_us / min(entry.kernels.values())
        return None

    return gain
