"""Read from the kernel cache what layers gained on this machine; nothing is measured here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import BUCKETS, KernelTimes
from prox24_lightning.convert.doctor import Gain
from prox24_lightning.convert.eligibility import LayerVerdict
from prox24_lightning.weights.rounding import RoundedForm


def measured_gain(
    machine: Machine, dtype: torch.dtype, *, form: RoundedForm | None = None, cache: Path | None = None
) -> Gain:
    """Return a function that looks up dense time over the time of the fastest packed kernel, by layer and tokens.

    A number of tokens that was not measured itself takes the next larger one of
    :data:`~prox24_lightning.convert.autotune.kernel_table.BUCKETS`, as a converted layer does.

    Args:
        machine: the GPU and the libraries, from :meth:`~prox24_lightning.convert.autotune.disk_cache.Machine.here`.
        dtype: of inputs and dense weights.
        form: of packed weights of 8 bits; None for weights in ``dtype``.
        cache: the file; None takes the default one.
    """
    return _lookup(machine, dtype, [form], cache, lambda entry: min(entry.kernels.values(), default=None))


def measured_fp8_gain(machine: Machine, dtype: torch.dtype, *, cache: Path | None = None) -> Gain:
    """Return a function that looks up dense time over that of a dense float8 weight; arguments as above."""
    return _lookup(machine, dtype, [None, "fp8_e4m3", "int8"], cache, lambda entry: entry.dense_fp8_us)


def _lookup(
    machine: Machine,
    dtype: torch.dtype,
    forms: Sequence[RoundedForm | None],
    cache: Path | None,
    time_of: Callable[[KernelTimes], float | None],
) -> Gain:
    entries = disk_cache.read(cache or disk_cache.default_path())

    def gain(verdict: LayerVerdict, tokens: int) -> float | None:
        larger = BUCKETS[min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]
        shape = verdict.shape[0], verdict.shape[1]
        for count in (tokens, larger):
            for form in forms:
                entry = entries.get(disk_cache.key(machine, dtype, shape, count, form))
                if entry is not None and (us := time_of(entry)) is not None:
                    return entry.dense_us / us
        return None

    return gain
