"""Invariant 4 under ``kill -9``: ten runs killed at random moments end, resumed, like the unbroken run, bit for bit."""

from __future__ import annotations

import pytest
import torch
from killed_runs import MOMENTS, kills, main
from new_processes import in_new_process
from resumed_runs import FREEZE, SETTINGS, START, assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    in_new_process(main, folder)
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
