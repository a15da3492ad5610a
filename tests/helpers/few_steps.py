"""Solves of few steps, for tests that look at a run and not at how good its masks are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from prox24_lightning.solvers.admm import PATHS
from prox24_lightning.solvers.config import DEFAULT_STEPS

STEPS = 40


@contextmanager
def few_solver_steps() -> Iterator[None]:
    """Solve each layer in a fifth of the steps that are usual."""
    short = replace(PATHS["short"], steps=STEPS)
    with patch.dict(DEFAULT_STEPS, {"prox": STEPS}), patch.dict(PATHS, {"short": short}):
        yield
