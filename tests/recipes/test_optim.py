"""The optimizer and schedule that the recipes share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recipes.optim import adamw_with_cosine


class Net(nn.Module):
    def __init__(self, total: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.trainer = SimpleNamespace(estimated_stepping_batches=total)


def rates(total: int, **options: float) -> list[float]:
    made = adamw_with_cosine(Net(total), lr=1.0, weight_decay=0.1, **{"warmup_steps": 4, **options})
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_warm_up_is_linear_and_then_the_cosine_falls_to_its_end():
    found = rates(20, final=0.1)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[12] == pytest.approx(0.55)
    assert found[20] == pytest.approx(0.1)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_no_warm_up_starts_at_the_peak():
    assert rates(5, warmup_steps=0)[0] == 1.0


def test_embeddings_have_a_rate_of_their_own():
    net = Net(10)
    net.words = nn.Embedding(5, 4)
    made = adamw_with_cosine(net, lr=2.0, weight_decay=0.1, warmup_steps=4, embedding_lr=0.1)
    *_, slow = made["optimizer"].param_groups
    assert slow["params"] == [net.words.weight]
    assert slow["lr"] == pytest.approx(0.2 / 4)


def test_only_matrices_decay_and_frozen_weights_are_left_out():
    net = Net(10)
    decayed, plain = adamw_with_cosine(net, lr=1.0, weight_decay=0.1, warmup_steps=0)["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert decayed["params"] == [net.linear.weight]
    assert plain["params"] == [net.linear.bias]


def test_steps_are_counted_by_optimizer_step():
    assert adamw_with_cosine(Net(10), lr=1.0, weight_decay=0.0, warmup_steps=0)["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize("total", [float("inf"), -1])
def test_a_run_of_unknown_length_is_refused(total):
    with pytest.raises(ValueError, match="set trainer.max_steps"):
        adamw_with_cosine(Net(total), lr=1.0, weight_decay=0.1, warmup_steps=0)


def test_rate_is_not_nan_when_the_run_is_shorter_than_the_warm_up():
    assert torch.tensor(rates(3, warmup_steps=10)).isfinite().all()
