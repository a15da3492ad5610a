"""``post_step``: the strength of its schedule, in units of 1 / rms of the weight, reaches the prox as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.mask import mask_24
from prox24_lightning.prox import prox_24
from prox24_lightning.schedules import FRACTION_CURVES, Constant, Linear
from prox24_lightning.sparsify import PhasePlan, PostStepProx
from prox24_lightning.sparsify.strategies.base import OptimizerStep, RunContext
from prox24_lightning.weights.selection import select_weights


def layer(factor=1.0, seed=0):
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model[0].weight.copy_(torch.randn(16, 32, generator=generator) * 0.3 * factor)
    return model, tuple(select_weights(model).chosen)


def begun(strategy, weights, scale=None):
    strategy.attach(RunContext(weights, PhasePlan(0, 10), lambda name: scale))
    strategy.begin()
    return strategy


@pytest.mark.parametrize("factor", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_prox_gets_the_scheduled_strength_over_the_rms(factor, scaled):
    model, weights = layer(factor)
    scale = torch.linspace(0.5, 2, 32) if scaled else None
    before = model[0].weight.detach().clone()
    rms = (before if scale is None else before * scale).square().mean().sqrt()
    strategy = begun(PostStepProx(Constant(0.7), FRACTION_CURVES["linear"]), weights, scale)
    strategy.after_step(OptimizerStep(5, weights))
    torch.testing.assert_close(model[0].weight.detach(), prox_24(before, 0.7 / rms, scale=scale))
    assert strategy.strengths[weights[0].name] == pytest.approx(0.7 / rms.item(), rel=1e-5)


def test_a_weight_of_another_unit_loses_the_same_entries():
    zeros = []
    for factor in (1e-2, 1.0, 1e2):
        model, weights = layer(factor)
        begun(PostStepProx(Constant(0.5), FRACTION_CURVES["linear"]), weights).after_step(OptimizerStep(5, weights))
        zeros.append(model[0].weight.detach() == 0)
    assert 0 < zeros[0].float().mean() < 0.5
    assert torch.equal(zeros[0], zeros[1])
    assert torch.equal(zeros[1], zeros[2])


def test_the_rms_is_that_of_the_begin_of_the_phase():
    model, weights = layer()
    rms = model[0].weight.detach().square().mean().sqrt()
    strategy = begun(PostStepProx(Linear(0.0, 2.0), FRACTION_CURVES["linear"]), weights)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    before = model[0].weight.detach().clone()
    strategy.after_step(OptimizerStep(4, weights))
    torch.testing.assert_close(model[0].weight.detach(), prox_24(before, 0.8 / rms))


def test_a_run_that_goes_on_from_a_checkpoint_takes_the_same_step():
    results = []
    for resumed in (False, True):
        model, weights = layer()
        strategy = begun(PostStepProx(Constant(0.4), FRACTION_CURVES["linear"], refit="restore"), weights)
        strategy.after_step(OptimizerStep(3, weights))
        if resumed:
            state, strategy = strategy.state_dict(), PostStepProx(Constant(0.4), FRACTION_CURVES["linear"])
            strategy.attach(RunContext(weights, PhasePlan(0, 10), lambda name: None))
            strategy.load_state_dict(state, {weight.name: weight for weight in weights})
        strategy.after_step(OptimizerStep(4, weights))
        masks = strategy.finish(weights)
        results.append((model[0].weight.detach().clone(), masks[weights[0].name]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_restored_values_are_those_before_the_first_prox():
    model, weights = layer()
    before = model[0].weight.detach().clone()
    strategy = begun(PostStepProx(Constant(0.4), FRACTION_CURVES["linear"], refit="restore"), weights)
    strategy.after_step(OptimizerStep(5, weights))
    shrunk = model[0].weight.detach().clone()
    masks = strategy.finish(weights)
    assert not torch.equal(shrunk, before)
    assert torch.equal(masks[weights[0].name], mask_24(shrunk))
    assert torch.equal(model[0].weight.detach(), before)


@pytest.mark.parametrize("step, share", [(0, 0.0), (5, 0.5), (10, 1.0)])
def test_a_fraction_leaves_the_other_groups_as_they_are(step, share):
    model, weights = layer()
    before = model[0].weight.detach().clone()
    begun(PostStepProx(None, FRACTION_CURVES["linear"]), weights).after_step(OptimizerStep(step, weights))
    after = model[0].weight.detach()
    changed = (after != before).view(-1, 4).any(1)
    assert changed.float().mean().item() == pytest.approx(share, abs=0.01)
    changed = changed.repeat_interleave(4).view_as(after)
    assert torch.equal(after, torch.where(changed, before * mask_24(before), before))
