"""An evenly spread sample of many values, the same on every device and rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_stride(count: int, samples: int) -> int:
    """Return a stride, coprime to ``count``, at which ``samples`` of ``count`` values are taken, modulo ``count``.

    A stride that shares a factor with the length of a row meets only some of its columns: 64 meets every 64th column of
    a row-wise weight of 4096. One that is coprime to all of them meets each column as often as the others.
    """
    stride = max(count // samples, 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def spread_sample(values: Tensor, samples: int) -> Tensor:
    """Return about ``samples`` of ``values``, flattened, at the :func:`sample_stride`; all where there are no more.

    No host synchronisation.
    """
    flat, count = values.reshape(-1), values.numel()
    if count <= samples:
        return flat
    return flat[torch.arange(samples, device=flat.device) * sample_stride(count, samples) % count]
