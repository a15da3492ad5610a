"""Invariant 4 under ``kill -9``: ten runs killed at random moments end, resumed, like the unbroken run, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import MOMENTS, kills
from resumed_runs import FREEZE, SETTINGS, START, assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parent.parent / "helpers" / "killed_runs.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("index, kill", list(enumerate(kills())))
def test_a_killed_run_ends_like_the_unbroken_one(folder, index, kill):
    unbroken, resumed = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (kill.setting, index))
    assert_same(unbroken, resumed)


def test_the_kills_cover_every_setting_and_phase():
    found = kills()
    assert {kill.setting for kill in found} == set(SETTINGS)
    phases = [
        sum(low < kill.step <= high for kill in found) for low, high in ((0, START), (START, FREEZE), (FREEZE, 99))
    ]
    assert min(phases) >= 3
    assert {kill.moment for kill in found} == set(MOMENTS)
