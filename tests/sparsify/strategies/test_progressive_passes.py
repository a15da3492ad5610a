"""``passes``: every block is solved a second time, from what training has made of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prox24_lightning.mask import is_24
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.weights.selection import select_weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def made(plan, *, lr=0.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    weights = select_weights(model).chosen
    strategy = Progressive(model, prox_steps=5, reconstruction_steps=20, batches=2, **options)
    return model, SparsityEngine(weights, plan, strategy), torch.optim.AdamW(model.parameters(), lr=lr)


def train(model, engine, optimizer, data, seen=None):
    engine.bind([optimizer])
    for x in data:
        engine.before_batch()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        engine.after_batch()
        if seen is not None:
            seen.append({name: mask.clone() for name, mask in engine.masks.items()})
    engine.unbind()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 16, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("plan", [PhasePlan(2, 2), PhasePlan(1, 13)], ids=["at once", "along the run"])
def test_a_second_pass_brings_the_pruned_model_closer_to_the_dense_one(plan):
    errors, seen = [], []
    for passes in (1, 2):
        model, engine, optimizer = made(plan, passes=passes)
        dense = copy.deepcopy(model)
        seen.clear()
        train(model, engine, optimizer, batches(14), seen)
        assert engine.phase == "frozen"
        assert all(is_24(w.parameter) and not w.parameter[~engine.masks[w.name]].any() for w in engine.weights)
        with torch.no_grad():
            errors.append(sum(float((model(x) - dense(x)).square().mean()) for x in batches(14)))
    assert errors[1] < 0.9 * errors[0]
    if plan.start < plan.freeze:
        halfway = seen[6]  # after step 7
        assert set(halfway) == set(engine.masks), "the first pass ends in the middle of the phase"
        assert any(not torch.equal(halfway[name], mask) for name, mask in engine.masks.items())


def test_a_run_resumed_between_two_visits_ends_like_the_unbroken_one(tmp_path):
    plan, data = PhasePlan(1, 13), batches(16)
    whole = made(plan, lr=0.01, passes=2)
    train(*whole, data)
    model, engine, optimizer = made(plan, lr=0.01, passes=2)
    train(model, engine, optimizer, data[:10])
    torch.save([model.state_dict(), engine.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    parts = made(plan, lr=0.01, passes=2)
    for part, state in zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*parts, data[10:])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, parts[0].state_dict()[name]), name


def test_what_a_second_visit_brings_back_has_second_moments_like_the_rest():
    model, engine, optimizer = made(PhasePlan(1, 13), lr=1e-3, passes=2)
    seen: list = []
    train(model, engine, optimizer, batches(14), seen)
    returned = 0
    for weight in engine.weights:
        stays, back = seen[-1][weight.name] & seen[6][weight.name], seen[-1][weight.name] & ~seen[6][weight.name]
        squares = optimizer.state[weight.parameter]["exp_avg_sq"]
        returned += int(back.sum())
        assert bool((squares[back] > 0.1 * squares[stays].mean()).all()), "else their first steps would be too long"
    assert returned


def test_streamed_layers_are_visited_once():
    model, engine, optimizer = made(PhasePlan(1, 9), passes=2, calibration="stream")
    seen = []
    train(model, engine, optimizer, batches(10), seen)
    assert len(seen[5]) < len(engine.masks), "single visits take the whole phase"
    for number in range(1, len(seen)):
        for name, mask in seen[number - 1].items():
            assert torch.equal(mask, seen[number][name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"passes": 0}, "passes=0 must be a whole number of visits"),
        ({"passes": 2, "strategy": "post_step"}, "passes=2 needs strategy='progressive'"),
        ({"passes": 2, "dense_target": 0.0}, "passes=2 needs dense_target above 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**options)
