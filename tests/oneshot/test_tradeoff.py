import csv
import io
import json
import math

import pytest
import torch
from tiny_reordered import IDS, llama

from prox24_lightning.oneshot import tradeoff as module
from prox24_lightning.oneshot.tradeoff import Tradeoff, TradeoffPoint, measure_tradeoff
from prox24_lightning.solvers.budget.measure import BudgetChoices
from prox24_lightning.solvers.budget.portfolio import Choice

DATA = [{"input_ids": IDS}]
OPTIONS = {"method": "wanda", "refine_steps": 5, "dense_target": 0.0}


@torch.no_grad()
def evaluate(model):
    return float(model(IDS, labels=IDS).loss)


def measured(model, **kwargs):
    return measure_tradeoff(model, DATA, evaluate, budgets=(0.0, 0.5), prune=OPTIONS, progress=False, **kwargs)


def test_points_go_from_24_to_dense_and_the_model_stays_dense(tmp_path):
    model, _ = llama()
    loss = evaluate(model)
    found = measured(model)
    assert evaluate(model) == loss == found.dense_loss
    assert [point.label for point in found.points] == ["2:4", "0.5", "dense"]
    assert [point.speedup for point in found.points] == pytest.approx([2.0, 4 / 3, 1.0], rel=0.03)
    assert not found.timed
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["dense layers"] for row in rows][::2] == ["0", "14"]
    assert rows[0]["choice"] == "2:4"
    assert rows[1]["choice"] == found.points[1].choice != ""
    assert len(json.loads(found.to_json())["prices"]) == 14
    found.plot(tmp_path / "curve.png", chosen=found.points[1])
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_a_killed_run_measures_only_what_is_left(tmp_path, monkeypatch):
    model, _ = llama()
    whole = measured(model)
    calls = []
    real = module.prune_layerwise

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "prune_layerwise", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(model, work_dir=tmp_path)
    assert measured(model, work_dir=tmp_path) == whole
    assert len(calls) == 3
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="another model, text, settings or version"):
        measured(model, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[:20], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"choices"', '"others"'), "settings or version"),
    ],
)
def test_a_file_of_choices_that_is_damaged_or_of_another_version(tmp_path, monkeypatch, change, problem):
    monkeypatch.setattr(
        module, "measure_choices", lambda *args, **kwargs: BudgetChoices((), (Choice("2:4", frozenset()),))
    )
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(module, "prune_layerwise", lambda *args, **kwargs: None)
    given = {"budgets": (0.0,), "work_dir": tmp_path, "progress": False}
    measure_tradeoff(model, DATA, lambda _: 1.0, **given)
    path = tmp_path / "tradeoff.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=problem):
        measure_tradeoff(model, DATA, lambda _: 1.0, **given)


def test_the_fastest_model_within_a_loss():
    points = [TradeoffPoint("2:4", 0.0, (), 2.0, 3.4), TradeoffPoint("0.5", 0.5, ("a",), 1.5, 3.1)]
    found = Tradeoff((*points, TradeoffPoint("dense", 1.0, ("a", "b"), 1.0, 3.0)), (), True)
    assert found.fastest(0.5).label == "2:4"
    assert found.fastest(0.2).label == "0.5"
    assert found.fastest(0.05).label == "dense"
    damaged = Tradeoff((*points, TradeoffPoint("dense", 1.0, ("a", "b"), 1.0, math.nan)), (), True)
    assert damaged.fastest(0.5).label == "dense"


def test_budgets_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"budgets \[1.5\] must lie in"):
        measure_tradeoff(llama()[0], DATA, evaluate, budgets=(0.0, 1.5))
