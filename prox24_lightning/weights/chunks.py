"""Cut the rows of a weight into chunks, which bounds the scratch memory of what is done to each."""

from __future__ import annotations

CHUNK_ENTRIES = 2**21
"""Entries of a weight that are rounded, packed or unpacked at a time."""


def row_chunks(rows: int, width: int) -> list[slice]:
    """Return slices of rows with so few entries that scratch tensors of their size are small."""
    if not width:
        return []
    step = max(1, CHUNK_ENTRIES // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
