"""Feature weights from the gradients of training: the right figures, and nothing outside of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.statistics.output_error import (
    OutputGradients,
    bounded_token_weights,
    token_importance,
    token_weights,
)
from prox24_lightning.weights.layer_matrix import input_rows


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


def test_tokens_count_by_what_their_error_does_to_the_output(layer):
    x = torch.randn(2, 5, 4)
    x[0, 0] *= 100
    found = token_importance([layer], lambda: layer(x))
    weights = token_weights(layer(x).detach()).flatten()  # of the last layer: no other entry of its output is reached
    torch.testing.assert_close(found[layer], [weights / weights.mean()])
    behind = torch.arange(10.0).view(2, 5, 1)
    found = token_importance([layer], lambda: layer(x) * behind + 1000)
    torch.testing.assert_close(found[layer], [behind.flatten().square() / behind.square().mean()], rtol=0.05, atol=0.0)


def test_features_that_do_not_count_leave_their_tokens_out(layer):
    gradients = OutputGradients("layer", layer, lambda output: -1, total=torch.tensor([1.0, 1, 1, 0, 0, 0]))
    sides = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])  # what each token reaches
    found = token_importance([layer], lambda: layer(torch.ones(2, 4)) * sides + 1, gradients)
    assert torch.equal(found[layer][0], torch.tensor([2.0, 0.0]))


def test_positions_of_a_convolution_count_in_the_order_of_its_patches():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    x, places = torch.randn(2, 4, 6, 6), torch.arange(18.0).view(2, 1, 3, 3)
    found = token_importance([layer], lambda: (layer(x) * places + 1000).movedim(1, -1))
    rows = input_rows(layer, x)
    assert len(found[layer][0]) == len(rows) == 18
    torch.testing.assert_close(
        found[layer][0], (places.square() / places.square().mean()).flatten(), rtol=0.05, atol=0.0
    )


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_where_no_gradient_tells_them_apart_tokens_count_alike(layer, factor):
    found = token_importance([layer], lambda: (layer(torch.ones(2, 4)) * factor).nan_to_num() + 1)
    assert torch.equal(found[layer][0], torch.ones(2))


def test_tokens_of_zeros_count_like_the_median_token():
    target = torch.randn(1, 100, 4, generator=torch.Generator().manual_seed(0))
    target[:, :61] = 0
    weights = token_weights(target)[0]
    torch.testing.assert_close(weights[:61], weights[61:].median().expand(61))
    torch.testing.assert_close(weights[61:], 1 / (100 * target[0, 61:].square().sum(-1)))
    assert not token_weights(torch.zeros(2, 4)).any(), "nothing to be relative to"


@pytest.mark.parametrize("kind", ["in place", "frozen"])
def test_token_importance_is_that_of_the_plain_block(layer, kind):
    x = torch.randn(8, 4)
    expected = token_importance([layer], lambda: torch.relu(layer(x)) + 1)
    layer.requires_grad_(kind != "frozen")
    activation = nn.ReLU(inplace=kind == "in place")
    assert torch.equal(token_importance([layer], lambda: activation(layer(x)) + 1)[layer][0], expected[layer][0])


def test_a_layer_without_gradient_leaves_the_others_theirs(layer):
    x, places, unreached = torch.randn(8, 4), torch.arange(8.0).unsqueeze(1), nn.Linear(4, 4)

    def output_of():
        with torch.no_grad():
            hidden = unreached(x)
        return layer(hidden) * places + 1000

    found = token_importance([unreached, layer], output_of)
    assert torch.equal(found[unreached][0], torch.ones(8))
    torch.testing.assert_close(found[layer][0], (places.square() / places.square().mean()).flatten(), rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        token_importance([layer], lambda: layer(x).detach())


def test_no_token_counts_for_more_than_the_median_one():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [200.0, 0.0], [0.0, 0.0]])
    # Squared norms 1, 4, 9, 40000; the median (the lower one) of those that are not zero is 4.
    wanted = torch.tensor([1, 1, 4 / 9, 1e-4, 1])
    torch.testing.assert_close(bounded_token_weights(outputs), wanted)
    assert torch.equal(bounded_token_weights(torch.zeros(3, 2)), torch.ones(3))
