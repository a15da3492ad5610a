"""A block through AOTInductor, in processes of their own: one that crashes or hangs is no more than an answer."""

from __future__ import annotations

import subprocess
import sys

import pytest


def compiled(form):
    arguments = ["--model=tiny", "--tokens=8", "--limit=140", f"--form={form}"]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot_inductor", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.gpu
@pytest.mark.slow
def test_a_converted_block_is_compiled_ahead_of_time_where_a_dense_one_is():
    if compiled("dense").returncode:
        pytest.skip("this torch compiles no dense block either")
    done = compiled("converted")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert float(done.stdout.split("error ")[-1]) < 0.02
