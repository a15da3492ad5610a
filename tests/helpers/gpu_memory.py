"""Whether torch gives a GPU's memory back."""

from __future__ import annotations

import torch

_ENTRIES = 1 << 28  # larger than what other tests leave free within memory that is in use


def memory_comes_back() -> bool:
    """Whether a freed tensor leaves the process; none does while a capture has not ended for the allocator."""
    torch.cuda.empty_cache()
    spent = torch.empty(_ENTRIES, device="cuda")
    size, before = spent.nbytes, torch.cuda.memory_reserved()
    del spent
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() <= before - size
