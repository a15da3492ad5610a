"""A model that gets worse on new batches before anything is pruned has too high a rate; noise and gains say nothing."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

from prox24_lightning.monitoring.early_rise import EarlyRise, EarlyWatch
from prox24_lightning.monitoring.loss_since_start import LossSinceStart

GROUPS = [{"lr": 0.5}, {"lr": 2.0}, {"lr": None}]


class Given:
    """Stands for a comparison that finds the given pairs."""

    def __init__(self, pairs, first=(1.0, 1.0)):
        self.pairs, self.heard, self.offloads, self.closed = [first, *pairs], 0, 0, False

    def listen(self, batch):
        self.heard += 1

    def compare(self, minimised):
        pair = self.pairs.pop(0)
        if isinstance(pair, Exception):
            raise pair
        return pair

    def offload(self):
        self.offloads += 1

    def close(self):
        self.closed = True


def run(pairs, *, steps=400, start=1000, dense=lambda step: True, until=100, first=(1.0, 1.0)):
    """Return the verdict, the step at which it came and the comparison; ``first``: what the first batch finds."""
    given = Given(pairs, first)
    watch = EarlyWatch(lambda: given, steps, start)
    for step in range(until):
        watch.begin_batch(step)
        if (rise := watch.end_batch(step + 1, dense(step + 1), GROUPS)) is not None:
            assert watch.has_ended
            return rise, step + 1, given
    return None, None, given


def test_the_last_batches_are_judged_at_a_twentieth_of_the_run():
    rise, step, given = run([(9.0, 1.0)] * 4 + [(1.06, 1.0), (1.08, 1.0)] * 3)
    assert step == 20
    assert given.heard == 11
    assert given.offloads == 1
    assert given.closed
    error = 0.01 * (6 / 5) ** 0.5 / 6**0.5
    assert rise == EarlyRise(20, pytest.approx(1.07), 1.0, pytest.approx(error), pytest.approx(0.06), 2.0)
    assert rise.share == pytest.approx(0.07)
    assert rise.is_too_high
    assert "1.07, 7.0% above that of the model before the run on the same batches (1)" in str(rise)
    assert "try half of it (1)" in rise.advice


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([(1.04, 1.0), (1.045, 1.0)] * 5, id="small"),
        pytest.param([(0.006, 0.001)] * 10, id="near zero"),
        pytest.param([(1.3, 1.0), (0.8, 1.0)] * 5, id="noise"),
        pytest.param([(0.9, 1.0)] * 10, id="fallen"),
        pytest.param([(0.1, 0.0)] * 10, id="from zero"),
    ],
)
def test_other_rises_say_nothing(pairs):
    rise, _, _ = run(pairs)
    assert not rise.is_too_high


def test_a_loss_that_explodes_counts_though_its_error_is_large():
    rise, _, _ = run([(2.0**number, 1.0) for number in range(2, 40, 4)])
    assert rise.now - rise.start < 3 * rise.error
    assert rise.is_too_high


def test_weights_that_are_pruned_earlier_end_it_there():
    rise, step, given = run([(1.06, 1.0)] * 10, dense=lambda step: step < 15)
    assert (step, given.heard) == (15, 6)
    assert rise.is_too_high
    assert run([(1.06, 1.0)] * 10, dense=lambda step: step < 13)[0] is None  # too few


@pytest.mark.parametrize(
    ("steps", "start", "last", "batches"), [(float("inf"), 32, 32, 17), (-1, 40, 40, 21), (10000, 9000, 500, 14)]
)
def test_the_length_of_the_run_decides_how_long_it_takes(steps, start, last, batches):
    rise, step, given = run([(1.0, 1.0)] * 100, steps=steps, start=start, until=1000)
    assert (step, given.heard) == (last, batches)
    assert not rise.is_too_high


@pytest.mark.parametrize(("steps", "start"), [(100, 100), (400, 0), (400, 4), (0, 0)])
def test_runs_that_are_too_short_make_no_copy(steps, start):
    def make():
        raise AssertionError

    assert EarlyWatch(make, steps, start).has_ended


def test_what_goes_wrong_ends_it_without_a_word():
    def broken():
        raise TypeError("no copy")

    assert EarlyWatch(broken, 400, 400).has_ended
    rise, _, given = run([(1.0, 1.0), torch.OutOfMemoryError("full")])
    assert rise is None
    assert given.closed
    assert run([(1.0, float("nan"))] * 10)[0] is None


@pytest.mark.parametrize("first", [(1.01, 1.0), (0.9, 1.0), (float("nan"), 1.0)])
def test_a_copy_that_computes_something_else_is_not_compared(first):
    rise, _, given = run([(2.0, 1.0)] * 20, first=first)
    assert rise is None
    assert given.closed
    assert given.heard == 1


def test_a_batch_that_cannot_be_looked_at_ends_it():
    given = Given([])
    given.listen = None
    watch = EarlyWatch(lambda: given, 400, 400)
    watch.begin_batch(0)
    assert watch.has_ended


class Model(nn.Module):
    """Draws random numbers, writes into its argument, and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x.mul_(1.0)
        return self.second(nn.functional.dropout(self.first(self.norm(x)), 0.3, self.training))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x.clone()), y)


def test_the_comparison_runs_the_model_as_it_was_and_leaves_training_alone():
    torch.manual_seed(0)
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    since = LossSinceStart(model, model)
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    state, statistics = torch.get_rng_state(), model.norm.running_mean.clone()
    since.listen((x, y))
    minimised = loss_of(model, x, y)
    after, seen = torch.get_rng_state(), model.norm.running_mean.clone()
    now, start = since.compare(minimised)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(model.norm.running_mean, seen)
    assert not torch.equal(seen, statistics)
    torch.set_rng_state(state)
    assert start == pytest.approx(loss_of(other, x, y).item())  # the same units are dropped
    assert now == minimised.item() != start
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_calls_without_gradients_and_later_ones_do_not_count():
    model = Model()
    since = LossSinceStart(model, model)
    x, y, z = torch.randn(16, 8), torch.randint(4, (16,)), torch.randint(4, (16,))
    since.listen((x, y, z))
    with torch.no_grad():
        loss_of(model, x + 1, y)
    minimised = loss_of(model, x, y)
    loss_of(model, x, z)
    assert since.compare(minimised)[0] == minimised.item()


def test_what_cannot_be_compared_is_an_error():
    model = Model()
    since = LossSinceStart(model, model)
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    since.listen((x, y))
    with pytest.raises(ValueError, match="cannot be computed"):
        since.compare(torch.tensor(1.0))
    since.listen((x, y))
    with pytest.raises(ValueError, match="cannot be computed"):
        since.compare(3 * loss_of(model, x, y))


def test_a_copy_without_room_is_not_made(monkeypatch):
    import prox24_lightning.monitoring.loss_since_start as module

    monkeypatch.setattr(module, "available_memory", lambda: 100.0)
    with pytest.raises(ValueError, match="no room"):
        LossSinceStart(Model(), Model())


def test_several_ranks_make_none(monkeypatch):
    import prox24_lightning.monitoring.loss_since_start as module

    monkeypatch.setattr(module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="other ranks"):
        LossSinceStart(Model(), Model())


def test_the_models_own_loss_counts_where_the_backward_pass_comes_to_it():
    class Own(Model):
        def forward(self, x, y):
            return {"loss": nn.functional.cross_entropy(super().forward(x), y), "logits": x}

    model = Own()
    since = LossSinceStart(model, model)
    batch = torch.randn(16, 8), torch.randint(4, (16,))
    since.listen()
    model(*batch)["loss"].backward()
    assert since.compare()[0] > 0
    since.listen()
    (2 * model(*batch)["loss"]).detach()
    with pytest.raises(ValueError, match="cannot be computed"):
        since.compare()


def test_only_plain_containers_are_looked_through():
    class Lazy(UserDict):
        def __getitem__(self, key):
            raise OSError("the file is gone")

    model = Model()
    since = LossSinceStart(model, model)
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    endless = {"x": [x, (y,)]}
    endless["self"] = endless
    for batch, found in ((endless, True), (Lazy(x=x, y=y), False)):
        since.listen(batch)
        minimised = loss_of(model, x, y)
        if found:
            assert since.compare(minimised)[0] == minimised.item()
        else:
            with pytest.raises(ValueError, match="cannot be computed"):
                since.compare(minimised)


def test_targets_that_are_overwritten_later_count_as_they_were():
    model = Model()
    since = LossSinceStart(model, model)
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    since.listen((x, y))
    torch.manual_seed(3)
    minimised = loss_of(model, x, y.clone())
    y.zero_()
    now, start = since.compare(minimised)
    assert now == pytest.approx(start)


def test_what_the_copy_shares_with_the_run_is_put_back():
    class Sharing(Model):
        def __init__(self):
            super().__init__()
            self.run = lambda x: self.second(self.norm(x))

        def forward(self, x):
            return self.run(x)

    model = Sharing()
    since = LossSinceStart(model, model)
    x, y = torch.randn(16, 8), torch.randint(4, (16,))
    since.listen((x, y))
    minimised = loss_of(model, x, y)
    seen = int(model.norm.num_batches_tracked)
    since.compare(minimised)
    assert int(model.norm.num_batches_tracked) == seen
