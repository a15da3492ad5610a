import pytest
import torch
from torch import nn

from prox24_lightning.weights.groups import to_groups
from prox24_lightning.weights.layer_matrix import as_matrix, from_matrix, input_rows, why_not_solvable


class Conv1D(nn.Module):
    """Hugging Face's transposed linear layer, by its shape."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


LAYERS = {
    "linear": (nn.Linear(8, 6, bias=False), (2, 5, 8)),
    "transposed linear": (Conv1D(6, 8), (2, 5, 8)),
    "conv2d": (nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (2, 8, 9, 7)),
    "conv1d": (nn.Conv1d(8, 6, 3, stride=2, padding=1, bias=False), (2, 8, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_the_matrix_are_the_layers_outputs(kind):
    layer, shape = LAYERS[kind]
    x = torch.randn(shape)
    y = layer(x)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        y = y.movedim(1, -1)
    torch.testing.assert_close(input_rows(layer, x) @ as_matrix(layer).T, y.reshape(-1, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_matrix_goes_back_into_the_layers_shape(kind):
    layer, _ = LAYERS[kind]
    assert torch.equal(from_matrix(layer, as_matrix(layer)), layer.weight)


def test_groups_of_a_convolution_lie_along_channels_at_every_position():
    layer = nn.Conv2d(8, 2, 3, bias=False)
    by_matrix = as_matrix(layer).unflatten(1, (-1, 4))[0]
    by_groups = to_groups(layer.weight, 1)[0].flatten(0, 2)
    assert {tuple(group.tolist()) for group in by_matrix} == {tuple(group.tolist()) for group in by_groups}


def test_an_image_without_a_batch_dimension_counts():
    layer, _ = LAYERS["conv2d"]
    assert input_rows(layer, torch.randn(8, 9, 7)).shape == (5 * 5, 48)


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "weight", "grouped convolution"),
        (nn.Conv2d(8, 8, 3, padding="same"), "weight", "padding 'same'"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "weight", "circular"),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", "MultiheadAttention: the layer-wise solver takes"),
    ],
)
def test_what_cannot_be_solved_says_why(module, name, reason):
    assert reason in why_not_solvable(module, name)
