"""The share of a batch's time is taken from the sampled batches alone."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.finetune import BatchTimer
from prox24_lightning.finetune.distillation import batch_timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(batch_timer.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def batch(timer, clock, part, rest, parts=1):
    timer.begin()
    for _ in range(parts):
        with timer.part():
            clock(part)
    clock(rest)
    timer.end()


def test_sampled_batches_alone_count(clock):
    timer = BatchTimer(torch.device("cpu"), every=3, warm_up=2)
    assert timer.result() is None
    for number in range(9):
        sampled = number in (2, 5, 8)
        batch(timer, clock, *((1.0, 3.0) if sampled else (100.0, 1.0)))
    share = timer.result()
    assert (share.part_ms, share.whole_ms, share.ratio, share.samples) == (1000, 4000, 0.25, 3)


def test_parts_of_a_batch_add_up(clock):
    timer = BatchTimer(torch.device("cpu"), every=1, warm_up=0)
    batch(timer, clock, 1.0, 2.0, parts=2)
    assert timer.result().ratio == 0.5


def test_a_batch_without_the_part_is_no_sample(clock):
    timer = BatchTimer(torch.device("cpu"), every=1, warm_up=0)
    batch(timer, clock, 1.0, 2.0, parts=0)
    assert timer.result() is None


def test_only_the_latest_samples_are_kept(clock):
    timer = BatchTimer(torch.device("cpu"), every=1, warm_up=0, most=4)
    for part in (9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0):
        batch(timer, clock, part, 1.0)
    assert (timer.result().samples, timer.result().part_ms) == (4, 1000)
