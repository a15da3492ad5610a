from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.mask import is_24
from prox24_lightning.solvers import solve_layer
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.weights.selection import select_weights


class Backwards(nn.Module):
    """Runs its layers in another order than the one in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x):
        return self.last(self.grouped(torch.relu(self.conv(x))).mean((-1, -2)))


def train(model, engine, steps, seen=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    engine.bind([optimizer])
    for _ in range(steps):
        engine.before_batch()
        optimizer.zero_grad()
        model(torch.randn(4, 4, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        if seen is not None:
            seen.append(set(engine.masks))
    engine.unbind()


def test_layers_are_frozen_one_by_one_in_the_order_in_which_they_run():
    torch.manual_seed(0)
    model, seen = Backwards(), []
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(2, 11), Progressive(model, batches=2))
    train(model, engine, 13, seen)
    sizes = [len(names) for names in seen]
    assert sizes == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 3, "turns after steps 5, 8 and 11"
    assert [seen[5], seen[8]] == [{"conv.weight"}, {"conv.weight", "grouped.weight"}]
    assert engine.phase == "frozen"
    assert all(is_24(weight.parameter, dim=weight.dim) for weight in engine.weights)


@pytest.mark.parametrize("geometry, dim", [("row", -1), ("column", 0), ("block", (0, 1))])
def test_a_layer_gets_the_solution_of_its_own_moments(geometry, dim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    weights = select_weights(model, geometry=geometry).chosen
    engine = SparsityEngine(weights, PhasePlan(0, 1), Progressive(model, dense_target=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(64, 16) @ torch.randn(16, 16)
    dense = model[0].weight.detach().clone()
    engine.bind([optimizer])
    engine.before_batch()
    model(x).sum().backward()
    optimizer.step()
    expected = solve_layer(dense, x.T @ x / 64, dim=dim)
    assert torch.equal(engine.masks["0.weight"], expected.mask)
    assert torch.allclose(model[0].weight, expected.weight, atol=1e-5)
    assert is_24(model[0].weight, dim=weights[0].dim)


def test_inputs_that_are_not_finite_do_not_lose_the_run(caplog):
    model = nn.Sequential(nn.Linear(8, 8))
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 1), Progressive(model, dense_target=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine.bind([optimizer])
    engine.before_batch()
    model(torch.full((2, 8), 1e30)).sum().backward()
    optimizer.step()
    assert "its largest weights are kept instead" in caplog.text
    assert is_24(model[0].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(bad, caplog):
    """As a gradient scaler leaves one behind: it skips the step, and training goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 3), Progressive(model, dense_target=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [torch.randn(64, 16) @ torch.randn(16, 16) for _ in range(3)]
    batches[1][5, 3] = bad
    dense = model[0].weight.detach().clone()
    engine.bind([optimizer])
    for x in batches:
        engine.before_batch()
        loss = model(x).sum()
        if loss.isfinite():
            loss.backward()
        optimizer.step()
    sound = torch.cat([batches[0], batches[2]])
    expected = solve_layer(dense, sound.T @ sound / len(sound))
    assert torch.equal(engine.masks["0.weight"], expected.mask)
    assert torch.allclose(model[0].weight, expected.weight, atol=1e-5)
    assert "in 1 of the last training batches" in caplog.text


def test_masks_of_minus_infinity_are_sound():
    hooked = HookedModule(nn.Identity(), batches=2)
    for value in (float("-inf"), 0.0):
        hooked.begin_batch(record=True)
        hooked.module(torch.tensor([value, 1.0]))
        hooked.end_batch()
    assert hooked.leave_out_unsound() == 0
    assert len(hooked.calls) == 2


def test_a_layer_that_never_runs_is_projected_at_the_freeze():
    class Idle(Backwards):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 8)

        def forward(self, x):
            return super().forward(x) + 0 * self.idle.weight.sum()

    model = Idle()
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 4), Progressive(model))
    train(model, engine, 5)
    assert is_24(model.idle.weight)


def test_hooks_are_removed():
    model = Backwards()
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(2, 11), Progressive(model, batches=2))
    train(model, engine, 4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_proximal_step_is_refused():
    with pytest.raises(ValueError, match="prox_steps=0 must be at least 1"):
        Progressive(nn.Linear(4, 4), prox_steps=0)
