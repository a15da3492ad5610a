"""Cut the rows of a weight into chunks, which bounds the scratch memory of what is done to each."""

from __future__ import annotations

CHUNK_ENTRIES = 2**21
"""Entries of a weight that are rounded, packed or unpacked at a time."""


def row_chunks(rows: int, width: int, entries: int | None = None) -> list[slice]:
    """Return slices of rows with at most ``entries`` each (or one row), so that scratch tensors are small.

    None takes :data:`CHUNK_ENTRIES`.
    """
    if not width:
        return []
    step = max(1, (entries or CHUNK_ENTRIES) // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
