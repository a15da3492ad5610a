"""A loss that rises while nothing is pruned says that the rate is too high; anything else says nothing."""

from __future__ import annotations

import math

import pytest
import torch

from prox24_lightning.monitoring.loss_rise import LossRise, LossWindow, RateWatch
from prox24_lightning.monitoring.training_loss import TrainingLoss

KEPT_2E_3 = "1.77 1.75 2.17 2.41 1.98 1.87 1.82 1.96 1.86 1.79 1.82 1.96 2.22 2.31 2.47 1.90"
KEPT_1E_3 = "1.77 1.69 1.66 1.76 1.65 1.75 1.68 1.79 1.69 1.66 1.65 1.66 1.71 1.62 1.68 1.64"
"""Recorded training losses of SmolLM2-135M at twice the best rate and at the best: 8 steps each, dense for 8, frozen
from step 40 on."""


def first_rise(means, *, start=1, freeze=5, **window):
    rise = LossRise()
    for number, mean in enumerate(means):
        given = {"rates": (2e-3,), **{key: value(number) for key, value in window.items()}}
        phase = "dense" if number < start else "sparsify" if number < freeze else "frozen"
        if (found := rise.add(LossWindow(8 * number + 1, 8 * number + 8, mean, **given), phase)) is not None:
            return found
    return None


def values(text):
    return [float(word) for word in text.split()]


def test_recorded_runs_at_twice_the_best_rate_and_at_the_best():
    found = first_rise(values(KEPT_2E_3))
    assert (found.now.last, found.now.mean, found.lowest.mean, found.start.mean) == (112, 2.31, 1.79, 1.77)
    for part in ("2.31 (steps 105 to 112)", "1.79 (steps 73 to 80)", "1.77 (steps 1 to 8)", "half of it (0.001)"):
        assert part in str(found)
    assert first_rise(values(KEPT_1E_3)) is None


@pytest.mark.parametrize(
    ("means", "window"),
    [
        pytest.param([1, 1, 2, 2, 2, 1.9, 1.8, 1.7, 1.6, 1.5], {}, id="pruning raised it"),
        pytest.param([3, 2, 2, 2, 2, 1, 2, 2, 2, 2], {}, id="not above the start"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 1, 2, 1], {}, id="single windows"),
        pytest.param([-1, -1, -1, -1, -1, -1, 0.5, 0.5, 0.5], {}, id="negative"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 2, 2], {"deviation": lambda n: 0.5, "count": lambda n: 9}, id="noisy"),
        pytest.param([1, 1, 1, 1, 1, 1, 1.3, 1.3], {"deviation": lambda n: 0.2, "count": lambda n: 4}, id="few"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 3, 4], {"rates": lambda n: (1e-3 * n,)}, id="the rate rises"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 3, 4], {"rates": lambda n: (1, 1e-3 * n)}, id="a smaller rate rises"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 2], {"rates": lambda n: (1.0,) * (1 + (n > 5))}, id="layers are unfrozen"),
        pytest.param([1, 1, 1, 1, 1, 1, 2, 2], {"rates": lambda n: (0.0,)}, id="no rate known"),
        pytest.param([1, 1, 1, 1, 1, math.nan, math.inf, math.nan, 1], {}, id="not finite"),
    ],
)
def test_silent(means, window):
    assert first_rise(means, **window) is None


def test_pruned_before_the_first_step():
    """Then the first losses are the start: those of a pruned model that recovers."""
    assert first_rise([6, 3, 2, 2.5, 3, 3], start=0, freeze=0) is None
    assert first_rise([6, 3, 2, 5, 7, 8], start=0, freeze=0).now.mean == 8


def test_the_start_is_the_end_of_the_dense_phase():
    found = first_rise([10, 5, 1, 1.3, 1, 1, 1.5, 1.6], start=3)
    assert (found.start.mean, found.now.mean) == (1, 1.6)


def test_losses_that_are_not_finite_are_left_out():
    assert first_rise([1, 1, 1, 1, 1, math.nan, 1, 2, 3]).now.mean == 3


def test_layers_that_join_the_run_are_pruned_anew():
    rise = LossRise()
    phases = [("dense", 1), ("frozen", 1), ("sparsify", 2), ("frozen", 2), ("frozen", 2)]
    assert [rise.add(LossWindow(1, 8, mean, rates=(1.0,)), phase) for phase, mean in phases] == [None] * 5


def watched(losses, *, steps=400, dense=8, frozen=16, rate=1e-2, **settings):
    watch, found = RateWatch(steps, **settings), []
    for step, loss in enumerate(losses, start=1):
        phase = "dense" if step <= dense else "sparsify" if step < frozen else "frozen"
        if (
            risen := watch.add({"loss": torch.tensor(loss)}, step, phase, [{"lr": rate}, {"lr": rate / 2}])
        ) is not None:
            found.append(risen)
    return found


def test_losses_are_summed_up_in_windows_of_one_phase():
    (found,) = watched([1.0] * 9 + [9.0] * 7 + [1.0] * 8 + [2.0] * 40)
    assert (found.start.first, found.start.last, found.start.mean) == (1, 8, 1.0)
    # The batch of step 16 was computed before the freeze.
    assert (found.lowest.first, found.lowest.last, found.now.first, found.now.last) == (17, 24, 33, 40)
    assert found.highest_rate == 1e-2


def test_a_short_dense_phase_is_enough():
    (found,) = watched([1.0] * 5 + [9.0] * 11 + [1.0] * 8 + [2.0] * 40, dense=4)
    assert (found.start.first, found.start.count) == (1, 5)


@pytest.mark.parametrize("outputs", [None, {"logits": 1}, torch.ones(3), {"loss": None}])
def test_steps_without_a_loss_are_left_out(outputs):
    watch = RateWatch(400)
    assert [watch.add(outputs, step, "frozen", [{"lr": 1}]) for step in range(40)] == [None] * 40


@pytest.mark.parametrize("steps", [-1, math.inf])
def test_a_run_of_unknown_length(steps):
    (found,) = watched([1.0] * 80 + [2.0] * 100, steps=steps)
    assert (found.lowest.last, found.now.last) == (48, 144)


def test_a_rate_that_the_optimizer_finds_itself_is_not_known():
    watch = RateWatch(400)
    losses = [1.0] * 16 + [2.0] * 40
    assert not any(watch.add(torch.tensor(loss), n, "frozen", [{"lr": None}]) for n, loss in enumerate(losses, start=1))


def test_losses_may_change_their_device():
    watch, mean = RateWatch(400), TrainingLoss()
    for step, device in enumerate(["meta", "cpu", "meta"], start=1):
        watch.add(torch.ones((), device=device), step, "frozen", [{"lr": 1}])
        mean.add(torch.ones((), device=device))


def test_one_noisy_batch_is_no_rise():
    assert watched([1.0] * 30 + [40.0] + [1.0] * 8 + [50.0] + [1.0] * 30) == []


def test_losses_of_adversaries_are_too_noisy():
    generator = torch.Generator().manual_seed(0)
    drift = torch.linspace(0, 3, 400).exp() * torch.randn(400, generator=generator).exp()
    assert watched(drift.tolist()) == []
