"""The loss that training minimises is recognised among those that a model's output and the batch allow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from prox24_lightning.calibration.recognised_loss import next_token_loss, possible_losses, recognised

DRAW = torch.Generator().manual_seed(0)
IDS = torch.randint(9, (3, 5), generator=DRAW)
TOKENS = torch.randn(3, 5, 9, generator=DRAW)
SMOOTHED = {"label_smoothing": 0.5}


def labels(*shape, classes):
    return torch.randint(classes, shape, generator=DRAW)


def find(output, minimised, *, ids=None, targets=()):
    losses = [(loss_of, loss_of(output)) for loss_of in possible_losses(output, ids, targets)]
    return recognised(losses, minimised)


def masked(target):
    return target.masked_fill(torch.arange(target.numel()).view(target.shape) % 2 == 0, -100)


CLASSES, IMAGE, MAP = labels(6, classes=4), torch.randn(6, 4, generator=DRAW), torch.randn(2, 4, 3, 3, generator=DRAW)
PARTS = masked(labels(3, 5, classes=9))
PIXELS, VALUES = labels(2, 3, 3, classes=4), torch.randn(6, 4, generator=DRAW)


@pytest.mark.parametrize(
    ("output", "minimised", "batch"),
    [
        pytest.param(SimpleNamespace(loss=torch.tensor(3.0)), torch.tensor(3.0), {}, id="own"),
        pytest.param({"loss": torch.tensor([3.0])}, torch.tensor(3.0), {}, id="own, in a mapping"),
        pytest.param(
            TOKENS, F.cross_entropy(TOKENS[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()), {"ids": IDS}, id="next token"
        ),
        pytest.param(
            SimpleNamespace(logits=TOKENS),
            F.cross_entropy(TOKENS.flatten(0, 1), PARTS.flatten()),
            {"ids": IDS, "targets": [IDS, PARTS]},
            id="token classes, some left out",
        ),
        pytest.param(IMAGE, F.cross_entropy(IMAGE, CLASSES), {"targets": [VALUES, CLASSES]}, id="classes"),
        pytest.param(MAP, F.cross_entropy(MAP, PIXELS), {"targets": [PIXELS]}, id="classes of pixels"),
        pytest.param(IMAGE, F.mse_loss(IMAGE, VALUES), {"targets": [CLASSES, VALUES]}, id="squared error"),
    ],
)
def test_a_loss_is_recognised_and_computed_for_other_outputs(output, minimised, batch):
    found = find(output, minimised, **batch)
    assert found is not None
    loss_of, value = found
    torch.testing.assert_close(value, minimised)
    torch.testing.assert_close(loss_of(output), minimised)
    if not hasattr(output, "loss") and not isinstance(output, dict):
        halved = SimpleNamespace(logits=output.logits / 2) if hasattr(output, "logits") else output / 2
        assert not torch.isclose(loss_of(halved), minimised, rtol=0.01)


@pytest.mark.parametrize(
    "minimised",
    [F.cross_entropy(IMAGE, CLASSES, **SMOOTHED), torch.tensor(float("nan")), torch.tensor(0.0)],
    ids=["smoothed", "nan", "zero"],
)
def test_another_loss_is_not(minimised):
    assert find(IMAGE, minimised, targets=[CLASSES, VALUES]) is None


def test_without_a_value_only_the_models_own_counts():
    assert find(IMAGE, None, targets=[CLASSES]) is None
    assert find(SimpleNamespace(loss=torch.tensor(2.0), logits=TOKENS), None, ids=IDS)[1] == 2


def test_what_is_no_output_allows_none():
    assert possible_losses("text", IDS, [CLASSES]) == []
    assert possible_losses(torch.tensor(1.0), None, [CLASSES]) == []


def test_tokens_that_are_left_out_have_no_part():
    target = IDS.clone()
    target[:, 1:3] = -100
    kept = target[:, 1:] != -100
    expected = F.cross_entropy(TOKENS[:, :-1][kept], target[:, 1:][kept])
    torch.testing.assert_close(next_token_loss(TOKENS, target), expected)
