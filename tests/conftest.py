"""What holds for all tests: one thread a process, few steps a solve, no deadline for a single example of Hypothesis.

The tensors of the tests are tiny, and threads that wait for each other are slow.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start

settings.register_profile("prox24", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("prox24")

HOW_GOOD = {"calibration", "oneshot", "solvers", "study"}
"""Folders of tests that look at how good the masks are. All others look at what a run does, whatever its masks."""


@pytest.fixture(autouse=True, scope="module")
def _few_solver_steps(request):
    if HOW_GOOD & set(Path(request.path).parts):
        yield
        return
    from few_steps import few_solver_steps

    with few_solver_steps():
        yield
