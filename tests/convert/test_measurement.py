"""Timing of calls, with a pretended clock. No GPU needed."""

from __future__ import annotations

import pytest
from pretended_clock import PretendedClock

from prox24_lightning.convert import measurement
from prox24_lightning.convert.measurement import WARM_UPS, host_seconds, time_calls


def test_variants_take_turns_and_every_second_round_is_reversed(monkeypatch):
    clock = PretendedClock(monkeypatch)
    made = []

    def call(name, us):
        def run():
            made.append(name)
            clock.work(us)

        return run

    times = time_calls({"a": call("a", 10), "b": call("b", 4)}, rounds=4, calls=2)
    assert made[2 * WARM_UPS :] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: time.median_us for name, time in times.items()} == {"a": 5, "b": 2}


def test_a_machine_that_slows_down_fakes_no_gain(monkeypatch):
    """Three times slower at the end than at the beginning: one after the other, equal calls would differ by half."""
    clock = PretendedClock(monkeypatch, slowing=5.0)
    times = time_calls({name: lambda: clock.work(10) for name in ("dense", "sparse")}, rounds=20)
    assert clock.slowing * clock.now / 1000 > 2
    assert times["dense"].median_us / times["sparse"].median_us == pytest.approx(1, abs=0.05)


def test_preparing_a_variant_costs_no_time(monkeypatch):
    clock = PretendedClock(monkeypatch)
    ready = []

    def prepare(name):
        ready[:] = [name]
        clock.work(1000)

    def call(name):
        def run():
            assert ready == [name]
            clock.work(10)

        return run

    times = time_calls({name: call(name) for name in "ab"}, rounds=3, prepare=prepare)
    assert [time.median_us for time in times.values()] == [10, 10]


def test_whole_calls_take_turns_too(monkeypatch):
    clock = PretendedClock(monkeypatch)
    monkeypatch.setattr(measurement, "perf_counter", lambda: clock.now)
    made = []

    def call(name, cost):
        def run():
            made.append(name)
            clock.work(cost)

        return run

    seconds = host_seconds({"a": call("a", 10), "b": call("b", 4)}, rounds=2, warm_ups=1)
    assert made == list("ababab")
    assert seconds["a"] / seconds["b"] == pytest.approx(2.5)
