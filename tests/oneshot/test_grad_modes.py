"""Pruning without training gives the same weights whatever mode of autograd it is called in."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_blocks import batches, prune, seeded

from prox24_lightning.oneshot.tradeoff import measure_tradeoff

OPTIONS = {
    "layer by layer": {},
    "reconstruction": {"reconstruct_steps": 2},
    "budget": {"budget": 0.3},
    "order of inputs": {"reorder_inputs": True},
    "8 bits": {"weights": "int8", "dense_target": 0.5},
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_mode_of_autograd_changes_nothing(options, mode):
    expected = seeded()
    prune(expected, **options)
    model = seeded().train()
    with mode():
        data = batches()
        prune(model, data, **options)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(data[0].clone()).sum().backward()


@pytest.mark.parametrize("options", [{"reconstruct_steps": 1}, {"budget": 0.3}, {"reorder_inputs": True}])
def test_parameters_that_take_no_gradient_are_refused_early(options):
    with torch.inference_mode():
        model = seeded()
    with pytest.raises(ValueError, match=r"embed\.weight was made within torch\.inference_mode.*copy\.deepcopy"):
        prune(model, **options)
    prune(model)
    prune(copy.deepcopy(model), **options)


def test_a_model_without_a_trainable_weight_is_told_the_remedy():
    with pytest.raises(ValueError, match=r"frozen \(requires_grad=False\).*; call requires_grad_\(True\)"):
        prune(seeded().requires_grad_(False))


def test_a_tradeoff_is_measured_in_inference_mode():
    def measured(model, data):
        options = {"method": "wanda", "refine": None, "dense_target": 0.0}
        evaluate = lambda model: float(model(data[0]).sum())  # noqa: E731
        return measure_tradeoff(model, data, evaluate, budgets=[0.5], prune=options, progress=False)

    model = seeded()
    with torch.inference_mode():
        assert [point.label for point in measured(model, batches()).points] == ["0.5", "dense"]
        with pytest.raises(ValueError, match="was made within"):
            measured(seeded(), batches())
