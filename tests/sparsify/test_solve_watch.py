"""Pauses are shown with the time that is left, and stop between small pieces."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.solvers.config import DEFAULT_STEPS
from prox24_lightning.solvers.layer import solve_layer
from prox24_lightning.sparsify import solve_watch
from prox24_lightning.sparsify.solve_watch import LogLines, SolveState, SolveWatch
from prox24_lightning.utils.long_work import between_pieces, watched


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(solve_watch.time, "perf_counter", lambda: self.now)

    def work(self, seconds, name=""):
        self.now += seconds
        between_pieces(name)


class Display:
    def __init__(self):
        self.shown, self.ends = [], []

    def show(self, state):
        self.shown.append(state)

    def end(self, state, *, stopped):
        self.ends.append(state)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_time_left_follows_from_the_work_that_is_done(clock):
    watch, display = SolveWatch(), Display()
    watch.attach(display)
    with watch.pause(blocks=30, costs=[1.0, 1.0, 1.0]):
        watch.block(3, "layers.2")
        clock.work(1.0, "layers.2.mlp")
        clock.work(3.0)
        watch.solved()
        watch.block(4, "layers.3")
        clock.work(1.0, "layers.3.attn")
    first, *_, last = display.shown
    assert first == SolveState(3, 30, "layers.2.mlp", 1.0, None)
    assert last == SolveState(4, 30, "layers.3.attn", 5.0, 7.0)  # 4 s a unit: two units, of which one second is done
    assert str(last) == "block 4 of 30 (layers.3.attn), 7 s left"
    assert display.ends == [last]
    with watch.pause(blocks=30, costs=[1.0, 1.0]):  # the first pause tells how long it takes
        watch.block(5, "layers.4")
        clock.work(2.0)
    assert display.shown[-1] == SolveState(5, 30, "layers.4", 2.0, 6.0)


def test_nothing_is_foretold_from_blocks_of_another_size(clock):
    watch, display = SolveWatch(), Display()
    watch.attach(display)
    with watch.pause(blocks=3, costs=[1.0, 25.0, 20.0]):
        watch.block(1, "conv")
        clock.work(2.0)
        watch.solved()
        watch.block(2, "linear.0")
        clock.work(1.0)
        assert display.shown[-1].seconds_left is None  # 48 s by the first block; it takes 5
        clock.work(4.0)
        watch.solved()
        watch.block(3, "linear.1")
        clock.work(1.0)
    assert display.shown[-1].seconds_left == 3.0


def test_a_short_pause_is_not_shown(clock):
    watch, display = SolveWatch(), Display()
    watch.attach(display)
    with watch.pause(blocks=1, costs=[1.0]):
        watch.block(1, "layer")
        clock.work(0.9)
    assert display.shown == display.ends == []


def test_what_was_at_work_when_it_was_stopped(clock):
    def stop():
        if clock.now > 102:
            raise KeyboardInterrupt

    watch = SolveWatch()
    watch.attach(None, stop)

    def solve():
        with watch.pause(blocks=8, costs=[1.0]):
            watch.block(2, "layers.1")
            for _ in range(5):
                clock.work(1.0, "layers.1.mlp")

    with pytest.raises(KeyboardInterrupt):
        solve()
    assert clock.now == 103
    assert (watch.interrupted.block, watch.interrupted.name) == (2, "layers.1.mlp")
    between_pieces()  # nobody watches any more


def test_lines_come_at_growing_intervals():
    lines = []
    log = LogLines(lines.append, "prox24")
    for second in range(1, 200):
        log.show(SolveState(1, 2, "layer", float(second)))
    log.end(SolveState(2, 2, "layer", 200.0), stopped=False)
    assert lines[0] == "prox24: solving block 1 of 2 (layer)"
    assert len(lines) == 7  # after 5, 10, 20, 40, 80, 140 s, and the end
    assert lines[-1] == "prox24: solved up to block 2 of 2 in 200.0 s"


@pytest.mark.parametrize("method", ["prox", "prox_gradient", "sparsegpt"])
def test_every_solver_says_when_a_piece_is_done(method):
    torch.manual_seed(0)
    x, pieces = torch.randn(64, 16), []
    with watched(pieces.append):
        solve_layer(torch.randn(8, 16), x.T @ x / 64, method=method, refine=None)
    assert len(pieces) >= DEFAULT_STEPS.get(method, 1)
    pieces.clear()
    with watched(pieces.append):
        solve_layer(torch.randn(8, 16), x.T @ x / 64, method="magnitude")
    assert len(pieces) >= 10
