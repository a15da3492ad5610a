"""The early rise is measured by rate in runs that stop there, and stands beside how whole runs end."""

from __future__ import annotations

import json

import pytest

from benchmarks.recovery.draw_text import main as draw_text
from benchmarks.recovery.early_rise import lines, main
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import PlainText
from tests.helpers.tiny_language import Chains, save_tiny_llama


def rise(now, warns):
    return {"start": 2.0, "now": now, "error": 0.01, "share": (now - 2) / 2, "warns": warns}


def test_each_rate_is_measured_until_the_rise_is_known_and_added(tmp_path):
    model = Pretrained(save_tiny_llama(tmp_path / "model"))
    given = {"steps": 160, "batch_size": 4, "length": 16, "model": model, "training": Chains(1000)}
    given |= {"cache": tmp_path / "tokens", "measured": tmp_path / "early.jsonl", "embedding_lr": 1.0}
    main(tmp_path, lrs=[1e-5, 1.0], **given)
    slow, fast = map(json.loads, (tmp_path / "early.jsonl").read_text().splitlines())
    assert slow["rise"]["step"] == fast["rise"]["step"] == 8
    assert abs(slow["rise"]["share"]) < 0.01
    assert fast["rise"]["share"] > 0.02
    assert not slow["rise"]["warns"]
    assert fast["rise"]["warns"]
    main(tmp_path, "recovery/again", **given)  # the table alone
    rows = json.loads(next(tmp_path.glob("recovery/*_again.json")).read_text())["rows"]
    assert [row["warning"] for row in rows] == ["no", "yes"]
    with pytest.raises(ValueError, match="holds nothing of"):
        main(tmp_path, **{**given, "model": Pretrained(str(tmp_path / "other"))})


def test_whole_runs_of_the_same_seed_and_rate_stand_beside_it():
    full = [
        {"row": "dense", "seed": 0, "lr": 1e-4, "losses": {"a": 1.0, "b": 2.0}},
        {"row": "dense", "seed": 0, "lr": 1e-3, "losses": {"a": 1.5, "b": 2.5}},
        {"row": "kept", "seed": 0, "lr": 1e-3, "losses": {"a": 1.2, "b": 2.2}},
        {"row": "kept", "seed": 0, "lr": 2e-3, "losses": {"a": 1.3, "b": 2.3}},
    ]
    measured = [
        {"embedding_lr": 0.0, "seed": 0, "lr": 1e-3, "rise": rise(2.01, False)},
        {"embedding_lr": 0.0, "seed": 0, "lr": 2e-3, "rise": rise(2.2, True)},
        {"embedding_lr": 0.0, "seed": 1, "lr": 2e-3, "rise": rise(2.2, True)},
        {"embedding_lr": 1.0, "seed": 0, "lr": 1e-3, "rise": rise(1.9, False)},
    ]
    found = lines(measured, full, {"kept": 0.0})
    assert [row["rise"] for row in found] == ["+0.50%", "+10.00%", "+10.00%", "-5.00%"]
    assert [row["excess in the end"] for row in found] == [0.2, 0.3, "", ""]
    assert [row["above the best rate"] for row in found] == ["+0%", "+50%", "", ""]
    assert [row["embeddings"] for row in found] == ["kept"] * 3 + ["trained"]


def test_the_text_of_a_run_is_written_and_read_back(tmp_path):
    draw_text(tmp_path / "text", Chains(40), {"docs": Chains(8)})
    training = PlainText(tmp_path / "text/training.jsonl", use="calibration")
    held_out = PlainText(tmp_path / "text/docs.jsonl")
    assert list(training.texts("calibration")) == Chains(40).texts("calibration")
    assert list(held_out.texts("evaluation")) == Chains(8).texts("evaluation")
    about = (tmp_path / "text/about.txt").read_text().splitlines()
    assert about[:2] == ["training: 40 chains of words", "docs: 8 chains of words"]
    assert "0.00% of docs" in about[2]
