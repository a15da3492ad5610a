"""Along which dimension a unit's features lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.weights.selection import select_weights


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Linear(8, 16), (2, 5, 16), -1),
        (nn.Linear(8, 16), (16, 16), -1),
        (nn.Linear(8, 16), (2, 16, 7, 7), 1),
        (nn.Linear(8, 16), (2, 16, 16), -1),
        (nn.Linear(8, 16), (2, 5, 9), -1),
        (nn.Conv1d(8, 16, 3), (2, 16, 16), 1),
        (nn.Conv2d(8, 16, 3), (2, 16, 9, 9), 1),
        (nn.Conv2d(8, 16, 3), (2, 9, 9, 16), -1),
    ],
)
def test_features_lie_where_the_size_is_that_of_a_layer(layer, shape, dim):
    weights = tuple(select_weights(layer, targets=["weight"]))
    assert weights
    block = Block("layer", layer, weights, HookedModule(layer, 1))
    assert block.feature_dim(torch.zeros(shape)) == dim
