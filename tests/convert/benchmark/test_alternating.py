"""Variants of one model in turn. No GPU needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pretended_clock import PretendedClock
from torch import nn

from prox24_lightning.convert.benchmark import alternating
from prox24_lightning.convert.benchmark.alternating import LayerSets, module_bytes, peak_bytes, time_alternating
from prox24_lightning.convert.measurement import WARM_UPS


class Slow(nn.Linear):
    """A layer that takes ``us`` microseconds of a pretended clock."""

    def __init__(self, clock: PretendedClock, us: float, seen: list[float]) -> None:
        super().__init__(4, 4)
        self.clock, self.us, self.seen = clock, us, seen

    def forward(self, rows):
        self.seen.append(self.us)
        self.clock.work(self.us)
        return super().forward(rows)


@pytest.fixture
def variants(monkeypatch):
    """A model of two layers in two variants, on a machine that slows down, and the layers that have run."""
    clock, seen = PretendedClock(monkeypatch, slowing=2.0), []
    model = nn.Sequential(Slow(clock, 10, seen), nn.ReLU(), Slow(clock, 10, seen))
    sets = {
        "dense": {"0": model[0], "2": model[2]},
        "sparse": {"0": Slow(clock, 5, seen), "2": Slow(clock, 5, seen)},
    }
    monkeypatch.setattr(alternating, "capture", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(alternating, "release_memory", lambda: None)
    return LayerSets(model, sets), seen


def test_a_set_of_layers_takes_the_place_of_another_under_every_name(variants):
    layers, _ = variants
    model = layers.model
    model.alias = model[0]
    layers = LayerSets(model, {"a": {"0": model[0]}, "b": {"0": nn.Linear(4, 4)}})
    first = model[0]
    layers.use("b")
    assert model[0] is model.alias is not first
    layers.use("a")
    assert model[0] is model.alias is first


def test_both_variants_run_in_every_round(variants):
    layers, seen = variants
    rows = torch.randn(3, 4)
    time_alternating(dict.fromkeys(("dense", "sparse"), lambda: layers.model(rows)), layers.use, rounds=4)
    eager = seen[4 * WARM_UPS :][:16]
    assert eager == [10, 10, 5, 5, 5, 5, 10, 10] * 2


def test_a_machine_that_slows_down_fakes_neither(variants):
    layers, _ = variants
    rows = torch.randn(3, 4)
    calls = dict.fromkeys(("dense", "sparse"), lambda: layers.model(rows))
    found = time_alternating(calls, layers.use, rounds=20)
    assert found["dense"].eager.median_us / found["sparse"].eager.median_us == pytest.approx(2, rel=0.05)


def test_a_variant_that_cannot_be_captured_has_a_reason(variants, monkeypatch):
    layers, _ = variants

    def capture(call):
        if layers.model[0].us == 5:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return SimpleNamespace(replay=call)

    monkeypatch.setattr(alternating, "capture", capture)
    rows = torch.randn(3, 4)
    calls = dict.fromkeys(("dense", "sparse"), lambda: layers.model(rows))
    found = time_alternating(calls, layers.use, rounds=2)
    assert found["dense"].graph is not None
    assert found["sparse"].graph is None
    assert found["sparse"].graph_problem == "RuntimeError: operation not permitted when stream is capturing"


def test_a_full_memory_is_no_reason_to_time_eagerly_alone(variants, monkeypatch):
    layers, _ = variants

    def capture(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(alternating, "capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        time_alternating({"dense": lambda: None}, layers.use, rounds=2)


def test_the_peak_leaves_out_what_else_is_in_memory(variants, monkeypatch):
    layers, _ = variants
    own = module_bytes(layers.model)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: own + 1000)  # the other variant's layers
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: own + 1000 + 70)
    made = []
    call, peak = peak_bytes(layers.model, lambda: made.append("made") or (lambda: made.append("run")))
    assert made == ["made", "run"]
    assert peak == own + 70
    call()
