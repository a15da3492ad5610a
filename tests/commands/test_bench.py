"""``prox24 bench``: what it refuses."""

from __future__ import annotations

import re

import pytest

from prox24_lightning.commands import bench as command
from prox24_lightning.convert import Target

HOPPER = Target("pretended H200", (9, 0), "cusparselt")


@pytest.mark.parametrize(
    "target, model, words, message",
    [
        (None, "sparse", [], "there is no CUDA GPU here, so nothing can be timed; prox24 doctor says what could"),
        (Target("P100", (6, 0), "cusparselt"), "sparse", [], "nothing runs sparse on this GPU: P100 has compute"),
        (HOPPER, "dense", [], "can run sparse here; prox24 doctor says why"),
        (HOPPER, "sparse", ["--prefill", "0"], "prefill, context, batches and length must be 1 or more"),
        (HOPPER, "sparse", ["--batches", "[0]"], "prefill, context, batches and length must be 1 or more"),
        (HOPPER, "sparse", ["--token_counts", "[-1]"], "token_counts=.* must be one or more whole numbers"),
        (HOPPER, "sparse", ["--length", "10000000"], "the text holds .* tokens, but 16 sequences"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    prox24, sparse_folder, dense_folder, monkeypatch, tmp_path, target, model, words, message
):
    monkeypatch.setattr(command, "find_target", lambda: target)
    folder = {"sparse": sparse_folder, "dense": dense_folder}[model]
    code, _, err = prox24("bench", folder, "--out", tmp_path / "out", *words)
    assert code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()
