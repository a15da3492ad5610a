"""Failures of the user's code when it is run again, known to all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prox24_lightning.utils.distributed import gathered_objects

T = TypeVar("T")


def described(error: Exception) -> str:
    """Return the class of an error and the beginning of its first line."""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first[:160]}"


class RerunError(RuntimeError):
    """The model could not be called again, on this rank or on another one; every rank raises it."""


def on_all_ranks(action: Callable[[], T]) -> T:
    """Return ``action()``, if it succeeds on every rank. All ranks call it; ``action`` makes no collective call.

    Raises:
        RerunError: on every rank, if it raises an error on any.
    """
    result, problem = None, None
    try:
        result = action()
    except Exception as error:  # of the user's forward
        problem = f"the model failed when it was called again ({described(error)})"
    problems = [found for found in gathered_objects(problem) if found is not None]
    if problems:
        raise RerunError(problems[0])
    return result  # type: ignore[return-value]


def direct(action: Callable[[], T]) -> T:
    """Return ``action()``, in place of :func:`on_all_ranks` where it makes collective calls: on sharded weights."""
    return action()
