from __future__ import annotations

import pytest

from prox24_lightning.schedules import (
    FRACTION_CURVES,
    STRENGTH_SCHEDULES,
    Constant,
    Cubic,
    Exponential,
    Linear,
    named_schedule,
)


@pytest.mark.parametrize("schedule", [Linear(2.0, 5.0), Cubic(2.0, 5.0), Exponential(2.0, 5.0)])
def test_schedules_meet_their_ends_and_never_turn_back(schedule):
    values = [schedule(i / 50) for i in range(51)]
    assert values[0] == pytest.approx(2.0)
    assert values[-1] == pytest.approx(5.0)
    assert values == sorted(values)
    assert schedule(-1) == values[0]
    assert schedule(2) == values[-1]


def test_shapes_between_the_ends():
    assert Linear(0.0, 1.0)(0.5) == pytest.approx(0.5)
    assert Cubic(0.0, 1.0)(0.5) == pytest.approx(0.875)
    assert Exponential(0.01, 100.0)(0.5) == pytest.approx(1.0)
    assert Constant(3.0)(0.7) == 3.0


def test_named_fraction_curves_run_from_nothing_to_everything():
    assert all((curve(0.0), curve(1.0)) == (0.0, 1.0) for curve in FRACTION_CURVES.values())


def test_a_schedule_object_passes_through_and_a_name_is_looked_up():
    assert named_schedule("linear", STRENGTH_SCHEDULES, "schedule") is STRENGTH_SCHEDULES["linear"]
    assert named_schedule(Constant(1.0), STRENGTH_SCHEDULES, "schedule") == Constant(1.0)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match=r"schedule='steep' is unknown; use one of exponential, "):
        named_schedule("steep", STRENGTH_SCHEDULES, "schedule")
    with pytest.raises(TypeError, match="takes a name or a Schedule, got 3"):
        named_schedule(3, STRENGTH_SCHEDULES, "schedule")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must be finite and not negative"):
        Linear(-1.0, 1.0)
    with pytest.raises(ValueError, match="needs positive ends"):
        Exponential(0.0, 1.0)
