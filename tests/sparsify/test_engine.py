"""The engine by itself, with bare optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.mask import is_24
from prox24_lightning.schedules import FRACTION_CURVES
from prox24_lightning.sparsify import PhasePlan, PostStepProx, Progressive, SparsityEngine
from prox24_lightning.weights.selection import select_weights


class Restless(torch.optim.SGD):
    """Writes to every entry of every weight in each step, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def post_step():
    return PostStepProx(None, FRACTION_CURVES["cubic"])


def train(engine, model, optimizer, steps, inputs):
    engine.bind([optimizer])
    for _ in range(steps):
        engine.before_batch()
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield
    engine.unbind()


def test_pruned_weights_are_masked_after_each_step():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(1, 3), post_step())
    for number, _ in enumerate(
        train(engine, model, Restless(model.parameters(), lr=0.1), 8, lambda: torch.randn(4, 16)), 1
    ):
        pruned = [
            weight.parameter.detach()[~mask]
            for weight, mask in zip(engine.weights, engine.masks.values(), strict=False)
        ]
        assert (number >= 3) == (engine.phase == "frozen")
        assert all((values == 0).all() for values in pruned)


def test_the_metric_follows_the_inputs():
    """A scale that was used once is not kept when newer inputs have been seen."""
    model = nn.Sequential(nn.Linear(8, 8))
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 100), post_step(), metric="activation")
    gain = torch.ones(8)
    seen = []
    for step, _ in enumerate(
        train(engine, model, torch.optim.SGD(model.parameters(), lr=0.0), 40, lambda: torch.randn(64, 8) * gain), 1
    ):
        if step == 4:
            gain[0] = 10.0
        seen.append(engine.metric_scale("0.weight").flatten()[0].item())
    assert seen[3] == pytest.approx(1.0, abs=0.2)
    assert seen[-1] > 1.5
    assert seen[-1] > seen[11] > seen[7] > seen[3]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("make", [post_step, None], ids=["post_step", "progressive"])
@pytest.mark.parametrize("shape", [(8, 0), (0, 8)])
def test_layers_without_inputs_or_outputs_are_no_obstacle(make, shape):
    class WithIdle(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.idle, self.head = nn.Linear(8, 8), nn.Linear(shape[1], shape[0]), nn.Linear(8, 4)

        def forward(self, x):
            hidden = self.inner(x)
            return self.head(hidden) + self.idle(hidden[:, : shape[1]]).sum()

    model = WithIdle()
    selection = select_weights(model)
    weights = selection.chosen
    assert "idle.weight" in {weight.name for weight in selection.skipped}
    engine = SparsityEngine(weights, PhasePlan(1, 4), make() if make else Progressive(model), metric="activation")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    list(train(engine, model, optimizer, 6, lambda: torch.randn(4, 8)))
    assert engine.phase == "frozen"
    assert is_24(model.inner.weight)


def test_an_error_in_the_freeze_leaves_the_weights_unfrozen():
    class Fails(PostStepProx):
        def finish(self, weights):
            raise RuntimeError("stop")

    model = nn.Sequential(nn.Linear(8, 8))
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 2), Fails(None, FRACTION_CURVES["cubic"]))
    with pytest.raises(RuntimeError, match="stop"):
        list(train(engine, model, torch.optim.SGD(model.parameters(), lr=0.1), 3, lambda: torch.randn(4, 8)))
    assert (engine.step, engine.phase, engine.masks) == (2, "sparsify", {})
    assert engine.state_dict()["phase"] == "sparsify"
