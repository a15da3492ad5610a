"""Triton's interpreter, which needs no GPU: what stands in for the instructions of a GPU there.

It runs the walk, the queue, the screening and the solvers that GPUs run. Left out are what only moves data faster
(prefetching, bfloat16 pairs, stores of whole groups), and the few instructions in ``roots.py`` are written in Triton.
"""

from __future__ import annotations

import os

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

SLOT = tl.constexpr(6)
"""32-bit numbers of a slot of the queue: four entries, the number of the group, and one more value."""


def queue_memory(slots: int, device: torch.device) -> Tensor | None:
    """Memory for the queue of a program in the interpreter, which runs one at a time; None on a GPU."""
    return torch.empty(slots * SLOT.value, dtype=torch.float32, device=device) if INTERPRETED.value else None
