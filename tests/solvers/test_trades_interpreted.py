"""The tests of ``interpreted/``, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted_kernels import run_interpreted


@pytest.mark.slow
def test_the_trade_kernel_in_the_interpreter():
    run_interpreted(Path(__file__).parent / "interpreted")
