"""``prox24 tradeoff``: points, figure, and a config that ``prox24 prune`` takes."""

import json
import re

import pytest
import yaml
from tiny_language import Chains, save_tiny_llama

QUICK = ("--sequences", 4, "--length", 16, "--eval_sequences", 2, "--batch_size", 2, "--steps", 3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_tiny_llama(home / "model")
    (home / "own.txt").write_text("\n\n".join(Chains(40).texts("calibration")))
    return home


def tradeoff(prox24, home, out, *words):
    return prox24("tradeoff", home / "model", "--text", home / "own.txt", "--output", out, *QUICK, *words)


def test_curve_and_the_config_of_the_picked_point(prox24, home, tmp_path):
    out = tmp_path / "out"
    code, printed, err = tradeoff(prox24, home, out, "--budgets", "[0.0, 0.3]", "--max_loss", 100)
    assert code == 0, err
    points = json.loads((out / "tradeoff.json").read_text())["points"]
    assert [point["label"] for point in points] == ["2:4", "0.3", "dense"]
    assert len((out / "tradeoff.csv").read_text().splitlines()) == 4
    assert (out / "tradeoff.png").exists()
    assert "picked: 2.000 x" in printed
    assert "chosen by" in printed
    config = yaml.safe_load((out / "prune.yaml").read_text())
    assert "skip" not in config or config["skip"] is None
    code, _, err = tradeoff(prox24, home, out, "--budgets", "[0.3]", "--max_loss", 100, "--overwrite", "true")
    assert code == 0, err
    config = yaml.safe_load((out / "prune.yaml").read_text())
    assert config["skip"] == points[1]["dense"]
    words = ("--config", out / "prune.yaml", "--text", home / "own.txt", "--output", tmp_path / "pruned", *QUICK)
    code, _, err = prox24("prune", home / "model", *words)
    assert code == 0, err
    report = json.loads((tmp_path / "pruned" / "layerwise.json").read_text())
    assert {row["name"] for row in report["skipped"] if row["reason"].startswith("skip=")} == set(config["skip"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max_loss", -1), "max_loss=-1.0 must be 0 or more"),
        (("--budgets", "[1.0]"), r"budgets \[1.0\] must lie in"),
        (("--eval_sequences", 0), "eval_sequences=0 leaves nothing"),
    ],
)
def test_settings_that_cannot_serve_are_refused(prox24, home, tmp_path, words, message):
    code, _, err = tradeoff(prox24, home, tmp_path / "out", *words)
    assert code == 2
    assert re.search(message, err)
