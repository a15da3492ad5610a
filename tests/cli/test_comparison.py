"""The table of a comparison and the files that keep it."""

from __future__ import annotations

import json
import math

import pytest

from prox24_lightning.cli.compare.comparison import Comparison, Run
from prox24_lightning.utils.environment import describe_environment


def comparison(*runs: Run) -> Comparison:
    return Comparison("val_ppl", "min", "prox24 compare", "trainer: {}", {"machine": "m"}, list(runs))


def test_row_holds_mean_and_sample_deviation_over_seeds():
    rows = comparison(
        Run("dense", 0, score=1.0, groups=10, seconds=2.0), Run("dense", 1, score=2.0, groups=10, seconds=4.0)
    ).rows()
    assert rows == [("dense", "1.5000 ± 0.7071", "0.00%", "3.0 ± 1.4", "0, 1")]


def test_one_seed_has_no_spread():
    assert comparison(Run("prox24", 0, score=3.0, sparse=9, groups=12)).rows()[0][1:3] == ("3.0000", "75.00%")


def test_rows_come_in_a_fixed_order():
    rows = comparison(Run("prox24", 0, score=1.0), Run("asp", 0, score=1.0), Run("dense", 0, score=1.0)).rows()
    assert [row[0] for row in rows] == ["dense", "one-shot magnitude (ASP)", "Prox24"]


def test_failed_runs_are_shown_and_do_not_enter_the_mean():
    found = comparison(Run("dense", 0, score=1.0), Run("dense", 1, error="OOM"), Run("asp", 0, error="OOM"))
    assert found.rows() == [
        ("dense", "1.0000", "0.00%", "0.0", "0 (1 failed)"),
        ("one-shot magnitude (ASP)", "failed", "-", "-", "0"),
    ]
    assert "dense, seed 1 failed: OOM" in found.warnings()


@pytest.mark.parametrize(
    ("scores", "shown"),
    [((1.0, math.nan), "nan"), ((math.inf, 1.0), "inf"), ((math.inf, -math.inf), "nan"), ((math.inf,), "inf")],
)
def test_a_run_that_diverged_is_shown_and_named(scores, shown, tmp_path):
    found = comparison(*(Run("dense", seed, score=score, scores={"m": score}) for seed, score in enumerate(scores)))
    found.write(tmp_path)
    assert found.rows()[0][1] == shown
    lost = [(seed, score) for seed, score in enumerate(scores) if not math.isfinite(score)]
    assert found.warnings() == [f"dense, seed {seed} ended with val_ppl = {score}: it diverged" for seed, score in lost]
    kept = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)["runs"]
    assert [run["score"] for run in kept] == [score if math.isfinite(score) else None for score in scores]
    assert [run["scores"]["m"] for run in kept] == [run["score"] for run in kept]


def test_different_batches_of_one_seed_are_reported():
    assert comparison(Run("dense", 0, batches=1), Run("asp", 0, batches=1), Run("asp", 1, batches=2)).warnings() == []
    assert "seed 0: the variants did not see the same training batches" in (
        comparison(Run("dense", 0, batches=1), Run("asp", 0, batches=2)).warnings()
    )


def test_different_step_counts_are_reported():
    found = comparison(Run("dense", 0, steps=10), Run("asp", 0, steps=9)).warnings()
    assert found == ["seed 0: the variants took 10, 9 steps"]


@pytest.mark.parametrize(("mode", "words"), [("min", "lower is better"), ("max", "higher is better")])
def test_heading_says_which_direction_is_better(mode, words):
    found = Comparison("m", mode, "", "", {})
    assert words in found.headings[1]


def test_files_hold_runs_command_machine_and_config(tmp_path):
    comparison(Run("dense", 0, score=1.0)).write(tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["runs"][0]["score"] == 1.0
    assert data["command"] == "prox24 compare"
    text = (tmp_path / "comparison.md").read_text()
    for part in ("# prox24 compare", "| dense | 1.0000 |", "- machine: m", "trainer: {}"):
        assert part in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "comparison.md"]


def test_describe_environment_name_machine_and_versions():
    facts = describe_environment()
    assert {"date", "commit", "machine", "gpu", "python", "torch", "lightning"} <= set(facts)
    assert "cores" in facts["machine"]
