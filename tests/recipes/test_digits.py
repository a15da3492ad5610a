"""The digits recipe: which layers qualify, and the split."""

from __future__ import annotations

import torch

from prox24_lightning.weights.selection import select_weights
from recipes.digits import DigitNet, Digits


def test_all_but_the_first_convolution_and_the_head_qualify():
    selection = select_weights(DigitNet(channels=8, hidden=16))
    assert [weight.name for weight in selection.chosen] == ["model.2.weight", "model.6.weight"]
    reasons = {weight.name: weight.reason for weight in selection.skipped}
    assert "one input channel" in reasons["model.0.weight"]
    assert reasons["head.weight"] == "output head"


def test_split_is_fixed_and_disjoint():
    first, second = Digits(validation=0.3), Digits(validation=0.3)
    first.setup("fit")
    second.setup("fit")
    assert torch.equal(first.training.tensors[0], second.training.tensors[0])
    assert len(first.training) + len(first.held_out) == 1797
    images = {tuple(image.flatten().tolist()) for image in first.training.tensors[0]}
    assert not any(tuple(image.flatten().tolist()) in images for image in first.held_out.tensors[0])


def test_images_lie_in_the_unit_interval():
    data = Digits()
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.min() == 0
    assert images.max() == 1
    assert labels.dtype == torch.int64
