"""Timing kernels. No GPU needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prox24_lightning.convert.autotune import time_kernels
from prox24_lightning.convert.autotune.cusparselt_algorithms import FastestAlgorithms
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel
from prox24_lightning.convert.measurement import Timing


@pytest.mark.parametrize("offset", [1.0, float("nan")])
def test_a_kernel_whose_products_are_wrong_is_not_timed(monkeypatch, offset):
    weight = torch.randn(8, 128)
    weights = time_kernels.Weights([weight], [weight])
    few, wrong = Kernel.few(TILINGS[0]), Kernel.few(TILINGS[1])

    def prepared(kernel, *_):
        return lambda inputs, *_: inputs @ weight.t() + (offset if kernel == wrong else 0)

    def measured(variants, **_):
        return {name: Timing(1.0, 1.0, 1.0) for name in variants}

    monkeypatch.setattr(time_kernels, "prepare", prepared)
    monkeypatch.setattr(time_kernels, "capture", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(time_kernels, "time_calls", measured)
    found = time_kernels.time_point(((8, 128), 3), torch.float32, [few, wrong], ["a note"], weights)
    assert list(found.kernels) == [str(few)]
    assert found.notes[0] == "a note"
    assert f"{wrong}: wrong products on this machine" in found.notes[1]


def test_no_algorithm_is_searched_for_layers_too_small_to_gain(monkeypatch):
    searched = []

    def fastest_algorithms(jobs, on_done):
        searched.extend(job.shape for job in jobs)
        return [FastestAlgorithms((7,)) for _ in jobs]

    monkeypatch.setattr(time_kernels, "support", lambda *_: SimpleNamespace(kernel="cusparselt"))
    monkeypatch.setattr(time_kernels, "fastest_algorithms", fastest_algorithms)
    monkeypatch.setattr(time_kernels, "_copies", lambda *_: 1)
    points = [((64, 32), 256), ((1024, 1024), 256)]
    progress = SimpleNamespace(begin=lambda *_: lambda: None)
    found = time_kernels._other_kernels(
        points, torch.bfloat16, 0, None, dict.fromkeys(points, (Kernel("few"),)), progress
    )
    assert searched == [(1024, 1024)]
    assert [found[point][0] for point in points] == [[Kernel("cusparselt")], [Kernel("cusparselt", (7,))]]
