"""A block through AOTInductor, in a process of its own: a compiler that crashes or hangs is a failed test, no more."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "converted"])
def test_a_block_is_compiled_ahead_of_time(form):
    arguments = ["--model=tiny", "--tokens=8", "--limit=180", f"--form={form}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot_inductor", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert float(done.stdout.split("error ")[-1]) < 0.02
