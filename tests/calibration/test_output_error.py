"""Feature weights from the gradients of training: the right figures, and nothing outside of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.output_error import OutputGradients


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 6)


def test_weights_are_the_mean_squared_gradients_of_each_feature(layer):
    found = OutputGradients("layer", layer, lambda output: -1)
    found.begin_batch()
    sums = torch.zeros(6)
    for scale in (1.0, 1e-6):  # a batch counts the same whatever the scale of its loss
        output = layer(torch.randn(3, 5, 4))
        output.retain_grad()
        (scale * (output * torch.arange(6.0)).square().sum()).backward()
        squares = output.grad.square().mean((0, 1))
        sums += squares / squares.mean()
    weights = found.weights(6, torch.device("cpu"))
    torch.testing.assert_close(weights, sums / sums.mean())
    assert weights[0] == 0


def test_without_training_all_features_count_the_same(layer):
    found = OutputGradients("layer", layer, lambda output: -1)
    with torch.no_grad():
        layer(torch.randn(3, 4))
    assert found.total is None
    assert torch.equal(found.weights(6, torch.device("cpu")), torch.ones(6))


def test_gradients_that_overflow_leave_the_others(layer):
    found = OutputGradients("layer", layer, lambda output: -1)
    layer(torch.randn(3, 4)).sum().backward()
    (layer(torch.randn(3, 4)) * torch.tensor([torch.inf, 1, 1, 1, 1, 1])).sum().backward()
    assert torch.isfinite(found.weights(6, torch.device("cpu"))).all()


def test_an_output_that_is_no_tensor_is_let_pass_and_detached_hears_nothing():
    class Named(nn.Linear):
        def forward(self, x):
            return {"x": super().forward(x)}

    named = Named(4, 6)
    found = OutputGradients("named", named, lambda output: -1)
    found.begin_batch()
    named(torch.randn(3, 4))["x"].sum().backward()
    assert found.total is None
    layer = nn.Linear(4, 6)
    found = OutputGradients("layer", layer, lambda output: -1)
    found.begin_batch()
    found.end_batch()
    layer(torch.randn(3, 4)).sum().backward()
    assert found.total is None
