import copy
import itertools
from functools import partial

import pytest
import torch
from tiny_blocks import batches, prune, seeded
from tiny_reordered import IDS, llama

from prox24_lightning.calibration.model_loss import ModelLoss
from prox24_lightning.oneshot.tradeoff import measure_choices
from prox24_lightning.solvers.budget.choose import LayerPrice, choose_dense, fill, predicted_speedup
from prox24_lightning.solvers.budget.measure import mean_on_all_ranks, split_batches
from prox24_lightning.solvers.budget.rules import RULES
from prox24_lightning.solvers.budget.switch import SwitchedWeights


def price(name, loss, dense=2.0, sparse=1.0, local=0.0):
    return LayerPrice(name, loss, local, dense, sparse)


def random_prices(seed, count=9):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, 2, generator=generator).tolist()
    return [price(str(number), loss, dense=1 + gain) for number, (loss, gain) in enumerate(draw)]


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_subsets(seed):
    prices, budget = random_prices(seed), 0.4
    room = budget * sum(one.gain for one in prices)
    every = [subset for size in range(10) for subset in itertools.combinations(prices, size)]
    fitting = [subset for subset in every if sum(one.gain for one in subset) <= room]
    best = max(sum(one.loss for one in subset) for subset in fitting)
    dense = choose_dense(prices, budget)
    found = [one for one in prices if one.name in dense]
    assert sum(one.gain for one in found) <= room
    assert sum(one.loss for one in found) >= 0.995 * best


def test_no_simple_rule_saves_more_of_the_summed_loss():
    prices = random_prices(1, 60)
    saved = {
        name: sum(p.loss for p in prices if p.name in dense)
        for name, dense in {
            "ours": choose_dense(prices, 0.25),
            "worst": fill(sorted(prices, key=lambda p: -p.loss), prices, 0.25),
            "order": fill(prices, prices, 0.25),
        }.items()
    }
    assert saved["ours"] >= max(saved.values()) * 0.999


def test_loss_counts_by_the_time_that_it_costs():
    prices = [price("large", 1.0, dense=11.0), price("small", 0.9, dense=2.0), price("other", 0.2, dense=10.0)]
    assert choose_dense(prices, 0.1) == {"small"}
    assert choose_dense(prices, 1.0) == {"large", "small", "other"}
    assert choose_dense(prices, 0.0) == set()


def test_layers_that_gain_nothing_stay_dense_and_those_that_help_become_24():
    prices = [price("slow", 0.1, dense=1.0, sparse=1.2), price("better", -0.1), price("worse", 0.1)]
    assert choose_dense(prices, 0.0) == {"slow"}
    assert choose_dense(prices, 1.0) == {"slow", "worse"}


def test_predicted_speed():
    prices = [price("a", 0.0, 4.0, 2.0), price("b", 0.0, 4.0, 2.0)]
    assert predicted_speedup(prices, ()) == 2.0
    assert predicted_speedup(prices, {"a"}) == pytest.approx(8 / 6)
    assert predicted_speedup(prices, {"a", "b"}) == 1.0


@torch.no_grad()
def test_the_loss_of_a_language_model_is_that_of_the_next_token():
    model, _ = llama()
    loss = ModelLoss([lambda: model(IDS), lambda: model(IDS.flip(0))], [IDS, IDS.flip(0)])
    assert loss() == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-5)


@torch.no_grad()
def test_a_loss_that_the_model_returns_counts_itself():
    model, _ = llama()
    batch = {"input_ids": IDS, "labels": torch.zeros_like(IDS)}
    assert ModelLoss([lambda: model(**batch)], [IDS])() == pytest.approx(float(model(**batch).loss), rel=1e-6)


def test_other_models_are_compared_with_their_own_outputs():
    model = seeded()
    loss = ModelLoss([partial(model, x) for x in batches()], [None] * 3)
    assert loss() == 0.0
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.bias.mul_(2)
    assert loss() == pytest.approx(1.0)


@torch.no_grad()
def test_a_price_is_the_rise_of_the_loss_with_one_layer_24():
    model, _ = llama()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": IDS}]
    prices = measure_choices(model, data, [0.0], progress=False).prices
    assert len(prices) == 14
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {one.gain for one in prices if "down_proj" in one.name} == {32 * 48 / 2}
    # Wanda's mask is that of a run that prunes this layer alone.
    name = "model.layers.0.mlp.up_proj.weight"
    alone = copy.deepcopy(model)
    prune(alone, data, targets=[name], method="wanda", refine_steps=50)
    rise = float(alone(IDS, labels=IDS).loss - model(IDS, labels=IDS).loss)
    assert next(one for one in prices if one.name == name).loss == pytest.approx(rise, abs=1e-5)


def test_times_of_the_layers_decide_where_they_are_given():
    model = seeded()
    names = [f"layers.{block}.{layer}.weight" for block in range(3) for layer in ("left", "right", "out")]
    times = dict.fromkeys(names, (100.0, 99.0)) | {names[0]: (10.0, 10.0), names[4]: (10.0, 11.0)}
    report = prune(model, budget=0.001, layer_times=times)
    dense = [weight.name for weight in report.skipped if weight.reason.startswith("budget")]
    assert dense == [names[0], names[4]]


def test_a_model_on_another_device_goes_by_local_losses(monkeypatch, caplog):
    def failing(*args):
        raise RuntimeError("no loss here")

    monkeypatch.setattr("prox24_lightning.oneshot.budget.ModelLoss", failing)
    report = prune(seeded(), budget=0.2)
    assert "no loss here" in caplog.text
    assert any(weight.reason.startswith("budget") for weight in report.skipped)


def test_choices_are_measured_as_whole_models_and_the_model_stays_as_it_is():
    model, _ = llama()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": IDS.roll(number)} for number in range(4)]
    found = measure_choices(model, data, [0.3, 0.6], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gains = {price.name: price.gain for price in found.prices}
    for budget, choice in zip((0.3, 0.6), found.choices, strict=True):
        assert sum(gains[name] for name in choice.dense) <= budget * sum(gains.values()) * (1 + 1e-6)
        assert {*RULES, "prices of the dense model", "prices of the 2:4 model"} <= dict(choice.tried).keys()
        assert choice.loss == min(loss for _, loss in choice.tried)
    assert measure_choices(model, data, [0.3, 0.6], progress=False) == found
    assert measure_choices(model, data, [0.3, 0.6], device="cpu:0", progress=False) == found  # as "cuda" is "cuda:0"
    pruned = copy.deepcopy(model)
    report = prune(pruned, data, method="wanda", budget=0.3)
    dense = {weight.name for weight in report.skipped if weight.reason.startswith("budget")}
    assert dense == found.choices[0].dense


def test_the_batches_that_decide_gave_no_price_if_there_are_enough():
    assert split_batches(8) == (slice(0, 2), slice(4, 8))
    assert split_batches(3) == (slice(0, 2), slice(2, 3))
    assert split_batches(2) == (slice(0, 2), slice(0, 2))


def test_a_model_that_fails_with_all_layers_24_goes_by_prices(monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise ArithmeticError("not on such weights")

    model, _ = llama()
    before = copy.deepcopy(model.state_dict())
    data = [{"input_ids": IDS}]
    monkeypatch.setattr("prox24_lightning.solvers.budget.measure.marginal_prices", failing)
    found = measure_choices(model, data, [0.3], progress=False)
    assert "not on such weights" in caplog.text
    assert found.choices[0].dense == choose_dense(found.prices, 0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_counts_as_infinity_and_an_error_is_told():
    assert mean_on_all_ranks(lambda: float("nan")) == float("inf")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        mean_on_all_ranks(lambda: 1 / 0)


def test_a_killed_run_keeps_its_choice(tmp_path, monkeypatch):
    first = prune(seeded(), batches(3), budget=0.3, work_dir=tmp_path)
    dense = {weight.name for weight in first.skipped if weight.reason.startswith("budget")}
    # Another measurement, as on a GPU whose sums differ from run to run, would leave other layers dense.
    monkeypatch.setattr("prox24_lightning.oneshot.budget.choose_layers", None)
    again = prune(seeded(), batches(3), budget=0.3, work_dir=tmp_path)
    assert {weight.name for weight in again.skipped if weight.reason.startswith("budget")} == dense
    assert again.masks.keys() == first.masks.keys()
    with pytest.raises(ValueError, match="layer_times was"):
        prune(seeded(), batches(3), budget=0.3, work_dir=tmp_path, layer_times={"a": (1.0, 2.0)})


def test_layers_that_cannot_be_solved_have_no_price():
    data = batches(3)
    data[0][0] = float("inf")
    found = measure_choices(seeded(), data, [0.3], progress=False)
    assert found.prices == ()
    assert found.choices[0].dense == frozenset()


def test_weights_hold_what_was_asked_for():
    weights = {name: torch.zeros(2) for name in "abc"}
    first, second = {name: torch.ones(2) for name in "abc"}, {name: torch.full((2,), 2.0) for name in "abc"}
    for name, value in weights.items():
        value.copy_(first[name])
    switch = SwitchedWeights(weights, first, second)
    for names in ("ab", "bc", "", "c"):
        switch.take_second(names)
        assert {name: value[0].item() for name, value in weights.items()} == {n: 1.0 + (n in names) for n in "abc"}


@torch.no_grad()
def test_the_loss_of_a_choice_is_that_of_the_24_model_with_its_dense_weights_put_back():
    model, _ = llama()
    data = [{"input_ids": IDS.roll(number)} for number in range(4)]
    choice = measure_choices(model, data, [0.5], progress=False).choices[0]
    mixed = copy.deepcopy(model)
    prune(mixed, data, method="wanda", refine_steps=50)
    for name in choice.dense:
        mixed.get_parameter(name).copy_(model.get_parameter(name))
    losses = [float(mixed(**one, labels=one["input_ids"]).loss) for one in data[2:]]
    assert choice.loss == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_a_loss_that_is_not_finite_decides_nothing(caplog):
    model, _ = llama()
    data = [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}]
    found = measure_choices(model, data, [0.3], progress=False)
    assert "own loss, since the model's cannot be measured: ValueError: its loss is nan" in caplog.text
    assert all(price.loss > 0 for price in found.prices)
    assert found.choices[0].name == "prices of the dense model"


def test_a_model_that_fails_with_one_layer_24_goes_by_own_losses(monkeypatch, caplog):
    model, _ = llama()
    before = copy.deepcopy(model.state_dict())
    calls = itertools.count()

    def failing(self):
        if next(calls) > 5:
            raise ArithmeticError("not on such weights")
        return 1.0

    monkeypatch.setattr(ModelLoss, "__call__", failing)
    found = measure_choices(model, [{"input_ids": IDS}], [0.3], progress=False)
    assert "each layer's own loss" in caplog.text
    assert "not on such weights" in caplog.text
    assert all(price.loss == price.local_loss for price in found.prices)
    assert len(found.prices) == 14
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_whose_24_form_breaks_the_model_stays_dense_first(monkeypatch):
    model, _ = llama()
    name = "model.layers.1.self_attn.v_proj.weight"
    dense = model.get_parameter(name).clone()
    whole = ModelLoss.__call__

    def damaged(self):
        return whole(self) if torch.equal(model.get_parameter(name), dense) else float("nan")

    monkeypatch.setattr(ModelLoss, "__call__", damaged)
    found = measure_choices(model, [{"input_ids": IDS}], [0.3], progress=False)
    assert next(price for price in found.prices if price.name == name).loss == float("inf")
    assert name in found.choices[0].dense
