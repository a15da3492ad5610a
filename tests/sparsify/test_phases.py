from __future__ import annotations

import math

import pytest

from prox24_lightning.sparsify import PhasePlan, check_step, resolve_plan


def test_phases_follow_the_finished_steps():
    plan = PhasePlan(start=2, freeze=5)
    assert [plan.phase(step) for step in range(7)] == ["dense"] * 3 + ["sparsify"] * 2 + ["frozen"] * 2
    assert [plan.progress(step) for step in (2, 5)] == [0.0, 1.0]


def test_start_equal_to_freeze_is_one_shot():
    assert [PhasePlan(3, 3).phase(step) for step in (2, 3)] == ["dense", "frozen"]


def test_fractions_and_steps_are_both_understood():
    assert resolve_plan(0.1, 0.6, 200) == PhasePlan(20, 120)
    assert resolve_plan(0, 1.0, 7) == PhasePlan(0, 7)
    assert resolve_plan(5, 9, math.inf) == PhasePlan(5, 9)
    assert resolve_plan(0.05, 0.05, 8) == PhasePlan(0, 1), "inputs of a batch are there, however short a trial run is"
    assert resolve_plan(0.0, 0.0, 8) == PhasePlan(0, 0)


@pytest.mark.parametrize(
    "start, freeze, total, words",
    [
        (0.1, 0.6, math.inf, "start=0.1 is a fraction of a run whose length is not known"),
        (1, 0.6, -1, "freeze=0.6 is a fraction of a run whose length is not known"),
        (1, 101, 100, "freeze=101 is beyond the run, which has 100 optimizer steps"),
        (0.5, 10, 100, r"start=0.5 \(step 50\) comes after freeze=10 \(step 10\)"),
    ],
)
def test_plans_that_cannot_work_are_refused(start, freeze, total, words):
    with pytest.raises(ValueError, match=words):
        resolve_plan(start, freeze, total)


@pytest.mark.parametrize(
    "value, error", [(-1, ValueError), (1.5, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_values_that_are_no_steps_are_refused(value, error):
    with pytest.raises(error, match="freeze"):
        check_step(value, "freeze")


@pytest.mark.parametrize(
    ("start", "freeze", "words"),
    [(0, 0, "before the first step"), (4, 4, "after step 4"), (4, 5, "after step 5"), (4, 9, "after steps 5 to 9")],
)
def test_when_weights_change_in_words(start, freeze, words):
    plan = PhasePlan(start, freeze)
    assert plan.when() == words
    if freeze - start > 1:
        assert next(step for step in range(12) if plan.phase(step) == "sparsify") == 5
    assert plan.phase(freeze) == "frozen"
