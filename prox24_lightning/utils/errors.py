"""Errors in one line."""

from __future__ import annotations


def describe(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, for a report or a log."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
