"""Gains that were measured on this machine before, from the kernel cache; nothing is measured here."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import torch

from prox24_lightning.convert.autotune import cache as kernel_cache
from prox24_lightning.convert.autotune.cache import Place
from prox24_lightning.convert.autotune.table import BUCKETS
from prox24_lightning.convert.doctor import Gain
from prox24_lightning.convert.eligibility import LayerVerdict


def measured_gain(place: Place, dtype: torch.dtype, *, cache: Path | None = None) -> Gain:
    """Dense time over the time of the fastest packed kernel, by shape and number of tokens.

    A number of tokens that was not measured itself goes by the next larger one of
    :data:`~prox24_lightning.convert.autotune.table.BUCKETS`, as a converted layer does.

    Args:
        place: the GPU and the libraries, from :meth:`~prox24_lightning.convert.autotune.cache.Place.here`.
        dtype: of the weights.
        cache: the file; None takes the default one.
    """
    entries = kernel_cache.read(cache or kernel_cache.default_path())

    def gain(verdict: LayerVerdict, tokens: int) -> float | None:
        larger = BUCKETS[min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]
        for count in (tokens, larger):
            entry = entries.get(kernel_cache.key(place, dtype, (verdict.shape[0], verdict.shape[1]), count))
            if entry is not None and entry.kernels:
                return entry.dense_us / min(entry.kernels.values())
        return None

    return gain
