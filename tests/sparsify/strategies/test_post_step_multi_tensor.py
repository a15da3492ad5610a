"""``post_step`` with one launch for all weights: ``pytest -m gpu tests/sparsify``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.finetune import MaskedParameters
from prox24_lightning.mask import mask_24, zeros_per_group
from prox24_lightning.monitoring.statistics import measure_sparsity
from prox24_lightning.prox import MultiTensorProx, settle_24
from prox24_lightning.schedules import FRACTION_CURVES, STRENGTH_SCHEDULES
from prox24_lightning.sparsify import PhasePlan, PostStepProx
from prox24_lightning.sparsify.engine import MOMENT_EVERY, SparsityEngine
from prox24_lightning.sparsify.pass_statistics import PassStatistics
from prox24_lightning.sparsify.strategies.base import OptimizerStep, RunContext
from prox24_lightning.sparsify.strategies.post_step.strength import strengths_for_fraction
from prox24_lightning.weights.selection import select_weights


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.2, 0.8, 1.0])
def test_a_sampled_strength_settles_the_wanted_share_of_each_weight(fraction):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    weights = [torch.randn(256, 512) * 0.02, torch.randn(64, 96), torch.randn(512, 256) * 3, torch.randn(16, 8, 3, 3)]
    weights[0] *= torch.where(torch.arange(512) // 4 % 2 == 0, 100.0, 1.0)
    weights, dims = [weight.cuda() for weight in weights], [1, 1, 0, 1]
    scales = [torch.rand(512).cuda() + 0.5, None, torch.rand(256).cuda() + 0.5, None]
    prox = MultiTensorProx()
    strengths = strengths_for_fraction(weights, fraction, dims=dims, scales=scales, multi_tensor=prox)
    assert strengths.shape == (4,)
    for weight, strength, dim, scale in zip(weights, strengths, dims, scales, strict=True):
        settled = settle_24(weight, strength, dim=dim, scale=scale)
        share = (zeros_per_group(settled, dim=dim) >= 2).double().mean().item()
        assert share == pytest.approx(fraction, abs=0.01)


def test_fraction_zero_needs_no_strength_and_a_bad_one_is_refused():
    settings = {"dims": [1], "scales": [None], "multi_tensor": MultiTensorProx()}
    assert strengths_for_fraction([torch.randn(16, 16)], 0.0, **settings).tolist() == [0.0]
    with pytest.raises(ValueError, match="fraction must lie in"):
        strengths_for_fraction([torch.randn(16, 16)], 1.2, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("by_strength", [True, False])
def test_together_is_what_one_by_one_gives(by_strength):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128), nn.Linear(128, 256)).cuda()
    weights = select_weights(model).chosen
    scales = {weights[0].name: torch.rand(256, device="cuda") + 0.5}
    schedule = STRENGTH_SCHEDULES["constant"] if by_strength else None
    strategy = PostStepProx(schedule, FRACTION_CURVES["linear"])
    strategy.attach(RunContext(weights, PhasePlan(0, 10), scales.get))
    strategy.begin()
    start = [weight.parameter.detach().clone() for weight in weights]
    for weight in weights:
        strategy.apply(weight, 0.5, scales.get(weight.name))
    alone = [weight.parameter.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, values in zip(weights, start, strict=True):
            weight.parameter.copy_(values)
    strategy.after_step(OptimizerStep(5, weights))
    for weight, want, before in zip(weights, alone, start, strict=True):
        got = weight.parameter.detach()
        assert not torch.equal(got, before)
        if by_strength:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        else:
            assert ((got != 0) != (want != 0)).double().mean() < 0.01  # the sample differs
        assert set(strategy.strengths) == {weight.name for weight in weights}


@pytest.mark.gpu
@pytest.mark.parametrize("by_strength", [True, False])
def test_statistics_of_the_step_are_those_of_a_pass_after_it(by_strength):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128)).cuda()
    weights = select_weights(model).chosen
    scales = {weights[0].name: torch.rand(256, device="cuda") + 0.5}
    strategy = PostStepProx(STRENGTH_SCHEDULES["constant"] if by_strength else None, FRACTION_CURVES["linear"])
    strategy.attach(RunContext(weights, PhasePlan(0, 10), scales.get))
    strategy.begin()
    seen, seen_alone, measured = {}, {}, PassStatistics()
    for step in (3, 6):
        measured.forget()
        strategy.after_step(OptimizerStep(step, weights, measured))
        assert all(measured.current(w.name, w.parameter, scales.get(w.name)) is not None for w in weights)
        got, layers = measure_sparsity(weights, scale_of=scales.get, last_masks=seen, from_pass=measured)
        want, layers_alone = measure_sparsity(weights, scale_of=scales.get, last_masks=seen_alone)
        for one, other in [(got, want), *zip(layers.values(), layers_alone.values(), strict=True)]:
            assert one.zeros == pytest.approx(other.zeros)
            assert one.penalty == pytest.approx(other.penalty, rel=1e-4)
            assert (one.retained_squared_norm, one.rms) == pytest.approx(
                (other.retained_squared_norm, other.rms), rel=1e-4
            )
            assert one.mask_flips == (other.mask_flips if step == 6 else None)
    with torch.no_grad():
        weights[0].parameter.mul_(2.0)
    assert measured.current(weights[0].name, weights[0].parameter, scales[weights[0].name]) is None
    measured.forget()
    assert all(measured.current(w.name, w.parameter, scales.get(w.name)) is None for w in weights)


@pytest.mark.gpu
def test_masks_hold_on_a_gpu_after_they_were_changed():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    parameter = nn.Parameter(torch.randn(16, 32, device="cuda"))
    masked = MaskedParameters()
    for sign in (1, -1):
        mask = mask_24(parameter.detach() * torch.arange(1.0, 33.0, device="cuda") ** sign)
        masked.apply("w", parameter, mask)
        with torch.no_grad():
            parameter.add_(1.0)
        masked.mask_weights()
        assert torch.equal(parameter.detach() != 0, mask & (parameter.detach() != 0))
        parameter.grad = None
        parameter.sum().backward()
        assert torch.equal(parameter.grad, mask.float())
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.gpu
@pytest.mark.parametrize("by_strength", [True, False])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_steps_do_not_wait_for_the_device_also_where_they_sample_layer_inputs(by_strength):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    train = training_step("cuda", by_strength)
    for _ in range(2 * MOMENT_EVERY):  # kernels are compiled and tables written
        train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(MOMENT_EVERY):
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_step(device, by_strength):
    """A function that makes one step of a small model in the sparsify phase, in the metric of its layer inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 128), nn.Linear(128, 256)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    strategy = PostStepProx(STRENGTH_SCHEDULES["constant"] if by_strength else None, FRACTION_CURVES["linear"])
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 100), strategy, metric="activation", model=model)
    engine.bind([optimizer])
    x = torch.randn(32, 256, device=device)

    def train():
        engine.before_batch()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.after_batch()

    return train
