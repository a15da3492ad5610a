"""Which layers stay dense, by the loss of whole models: against simple rules and every subset, within the budget."""

import itertools
import math

import pytest
import torch

from prox24_lightning.solvers.budget.choose import LayerPrice
from prox24_lightning.solvers.budget.portfolio import (
    MOVES,
    POOL,
    Choice,
    choose_by_loss,
    evaluations,
    marginal_prices,
)
from prox24_lightning.solvers.budget.rules import RULES

BUDGETS = (0.1, 0.25, 0.5)


def layers(blocks, *, seed=0, same_times=False):
    """Four layers a block, local losses and times at random."""
    draw = torch.rand(4 * blocks, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    names = [f"model.layers.{b}.{name}.weight" for b in range(blocks) for name in ("q_proj", "o_proj", "up", "down")]
    times = [2.0 if same_times else 1.5 + gain for _, gain in draw]
    return [LayerPrice(n, 0.0, local, time, 1.0) for n, (local, _), time in zip(names, draw, times, strict=True)]


class Model:
    """Its loss is a sum over layers that are 2:4, and over pairs of them."""

    def __init__(self, prices, alone, pairs):
        self.names = [price.name for price in prices]
        self.alone, self.pairs, self.calls = alone, pairs, 0

    def __call__(self, dense):
        self.calls += 1
        sparse = {name for name in self.names if name not in dense}
        return 3.0 + sum(self.alone[n] for n in sparse) + sum(w for (a, b), w in self.pairs.items() if {a, b} <= sparse)


def random_model(prices, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    names = [price.name for price in prices]
    alone = dict(zip(names, torch.rand(len(names), generator=generator).square().tolist(), strict=True))
    strength = (torch.rand(len(names), len(names), generator=generator) / len(names)).tolist()
    every = itertools.combinations(range(len(names)), 2)
    return Model(prices, alone, {(names[i], names[j]): strength[i][j] for i, j in every})


def sides(prices, model):
    return marginal_prices(prices, model.names, model), marginal_prices(prices, (), model)


def choose(prices, model, budget, **kwargs):
    return choose_by_loss(*sides(prices, model), budget, model, model, **kwargs)


def given_back(prices, dense):
    return sum(one.gain for one in prices if one.name in dense) / sum(one.gain for one in prices)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_any_rule_and_within_the_budget(seed, budget):
    prices = layers(5, seed=seed)
    model = random_model(prices, seed)
    found = choose(prices, model, budget)
    assert given_back(prices, found.dense) <= budget * (1 + 1e-6)
    assert found.loss == model(found.dense) == min(loss for _, loss in found.tried)
    for rule in RULES.values():
        assert given_back(prices, rule(prices, budget)) <= budget * (1 + 1e-6)
        assert found.loss <= model(rule(prices, budget))


def test_layers_that_count_only_together_are_found_where_every_rule_fails():
    """Blocks 2 and 3 save much if both are dense; attention, the ends and the worst local losses save little."""
    prices = layers(6, same_times=True)
    names = [price.name for price in prices]
    good = {name for name in names if ".2." in name or ".3." in name}
    alone = {name: 0.02 if "proj" in name else 0.01 for name in names}
    # The loss stays high as long as one of the eight layers is 2:4: a single one dense in the 2:4 model saves nothing.
    prices = [LayerPrice(p.name, 0, 0.1 if p.name in good else 0.9, p.dense_time, p.sparse_time) for p in prices]

    def loss(dense):
        sparse = [name for name in names if name not in dense]
        return sum(alone[name] for name in sparse) + (1.0 if good & set(sparse) else 0.0)

    model = Model(prices, alone, {})
    by_rules = {name: loss(rule(prices, 1 / 3)) for name, rule in RULES.items()}
    found = choose_by_loss(
        marginal_prices(prices, model.names, loss), marginal_prices(prices, (), loss), 1 / 3, loss, loss
    )
    assert found.dense == good
    assert found.loss < min(by_rules.values()) - 0.9


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_come_close_to_the_best_of_all_subsets(seed):
    prices = layers(3, seed=seed, same_times=True)
    model = random_model(prices, seed)
    best = min(model(subset) for subset in itertools.combinations(model.names, 4))
    worst = model(())
    found = choose(prices, model, 1 / 3)
    assert worst - found.loss >= 0.98 * (worst - best)


def test_exchanges_lower_the_loss_where_prices_mislead(monkeypatch):
    """Pairs of equal layers: one of each pair is enough, and single prices would leave both dense, or none."""
    prices = layers(8, same_times=True)
    names = [price.name for price in prices]
    pairs = {(a, b): 1.0 + number / 100 for number, (a, b) in enumerate(zip(names[::2], names[1::2], strict=True))}
    model = Model(prices, dict.fromkeys(names, 0.0), pairs)
    monkeypatch.setattr("prox24_lightning.solvers.budget.portfolio.ROUNDS", 1)
    found = choose(prices, model, 0.5)
    assert found.loss == pytest.approx(3.0)
    assert found.name.endswith(", then exchanges")


def test_the_choice_is_the_same_again_and_takes_a_bounded_number_of_measurements():
    prices = layers(14)
    model = random_model(prices, 5)
    found = choose(prices, model, 0.25)
    calls = model.calls
    assert choose(prices, random_model(prices, 5), 0.25) == found
    steps = []
    choose(prices, model, 0.25, describe=steps.append)
    assert len(steps) + len(prices) <= evaluations(len(prices), [0.25])
    # Beside a base for each set of prices.
    assert calls <= len(prices) + evaluations(len(prices), [0.25]) + 4
    assert evaluations(1000, [0.25]) < 1000 + 10 + 4 * POOL + 2 * (MOVES + 2)


def test_a_measurement_that_is_not_finite_never_wins():
    prices = layers(4)
    plain = random_model(prices, 1)
    bad = RULES["attention dense"](prices, 0.25)

    def judge(dense):
        return math.inf if set(dense) == bad else plain(dense)

    found = choose_by_loss(*sides(prices, plain), 0.25, plain, judge)
    assert found.dense != bad
    assert math.isfinite(found.loss)


def test_layers_that_gain_nothing_stay_dense():
    prices = layers(4)
    prices[5] = LayerPrice(prices[5].name, 0.0, 0.0, 1.0, 1.2)
    model = random_model(prices, 2)
    model.alone[prices[5].name] = -1.0
    for budget in (0.0, 0.3):
        assert prices[5].name in choose(prices, model, budget).dense
    assert choose(prices, model, 0.0) == Choice("2:4", frozenset({prices[5].name}))


def test_a_choice_in_a_file_is_read_as_it_was():
    choice = Choice("mixed prices", frozenset({"a", "b"}), 0.5, (("mixed prices", 0.5), ("attention dense", 0.7)))
    assert Choice.from_dict(choice.to_dict()) == choice


@pytest.mark.parametrize(
    ("names", "dense"),
    [
        (["layers.0.a", "layers.1.a", "layers.1.b", "layers.2.a", "layers.3.a"], {"layers.0.a", "layers.3.a"}),
        (["a", "b", "c", "d", "e"], {"a", "e"}),
    ],
)
def test_the_ends_are_blocks_or_layers_without_one(names, dense):
    prices = [LayerPrice(name, 0.0, 0.0, 2.0, 1.0) for name in names]
    assert RULES["first and last blocks dense"](prices, 0.4) == dense


def test_prices_decide_where_no_loss_can():
    prices = layers(4)
    found = choose_by_loss(
        *sides(prices, random_model(prices, 1)), 0.25, lambda dense: math.inf, lambda dense: math.inf
    )
    assert found.name == "prices of the dense model"
