"""The statistics of a run: order, thinning, and a place in every checkpoint."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch

from prox24_lightning.monitoring.history import SparsityHistory
from prox24_lightning.monitoring.statistics import SparsityStats

LAYERS = ("a.weight", "b.weight")


def stats(fraction=0.5, flips=None, strength=None):
    zeros = (1 - fraction, 0.0, fraction, 0.0, 0.0)
    return SparsityStats(
        groups=8, zeros=zeros, retained_squared_norm=0.9, penalty=1.0, rms=1.0, mask_flips=flips, strength=strength
    )


def add(history, step, fraction=0.5, **values):
    history.record(step, stats(fraction, **values), {name: stats(fraction) for name in LAYERS})


def test_steps_in_order():
    history = SparsityHistory(LAYERS)
    add(history, 0, 0.0)
    add(history, 10, 0.25, flips=0.125, strength=3.0)
    assert history.steps == [0, 10]
    assert history.groups_24 == [0.0, 0.25]
    assert history.fractions == [[0.0, 0.0], [0.25, 0.25]]
    assert history.series["strength"][1] == 3.0
    assert math.isnan(history.series["strength"][0])


def test_the_worst_layer_is_kept():
    history = SparsityHistory(LAYERS)
    worst = SparsityStats(groups=8, zeros=(1.0, 0, 0, 0, 0), retained_squared_norm=0.5, penalty=1.0, rms=1.0)
    history.record(0, stats(), {"a.weight": stats(), "b.weight": worst})
    assert history.series["lowest_retained_squared_norm"] == [0.5]


def test_layers_that_are_24_do_not_count_in_the_retained_norm():
    history = SparsityHistory(LAYERS)
    dense = SparsityStats(groups=8, zeros=(1.0, 0, 0, 0, 0), retained_squared_norm=0.5, penalty=1.0, rms=1.0)
    sparse = SparsityStats(groups=8, zeros=(0, 0, 1.0, 0, 0), retained_squared_norm=1.0, penalty=0.0, rms=1.0)
    history.record(0, stats(), {"a.weight": sparse, "b.weight": dense})
    history.record(1, stats(), {"a.weight": sparse, "b.weight": sparse})
    assert history.series["retained_squared_norm"][0] == 0.5
    assert math.isnan(history.series["retained_squared_norm"][1])


def test_the_retained_norm_weighs_layers_by_their_squared_norm():
    history = SparsityHistory(LAYERS)
    small = SparsityStats(groups=4, zeros=(1.0, 0, 0, 0, 0), retained_squared_norm=0.5, penalty=1.0, rms=1.0)
    large = SparsityStats(groups=4, zeros=(1.0, 0, 0, 0, 0), retained_squared_norm=0.75, penalty=1.0, rms=2.0)
    history.record(0, stats(), {"a.weight": small, "b.weight": large})
    assert history.series["retained_squared_norm"] == [0.7]


def test_metrics_are_kept_by_step_and_rewound():
    history = SparsityHistory(LAYERS)
    history.record_metric(5, "val_loss", 3.0)
    history.record_metric(10, "val_loss", 2.0)
    history.record_metric(10, "val_loss", 1.5)
    assert history.metrics == [(5, 3.0), (10, 1.5)]
    history.rewind(9)
    assert history.metrics == [(5, 3.0)]
    history.record_metric(10, "val_acc", 0.5)
    assert (history.metric_name, history.metrics) == ("val_acc", [(10, 0.5)])


def test_a_second_record_of_a_step_replaces_the_first_and_keeps_its_flips():
    history = SparsityHistory(LAYERS)
    add(history, 5, 0.25, flips=0.5)
    add(history, 5, 0.75, flips=0.0)
    assert history.steps == [5]
    assert history.groups_24 == [0.75]
    assert history.series["mask_flips"] == [0.5]


def test_an_earlier_step_is_refused():
    history = SparsityHistory(LAYERS)
    add(history, 5)
    with pytest.raises(ValueError, match="step 4 lies before the newest recorded step 5"):
        add(history, 4)


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="do not fit a history of"):
        SparsityHistory(LAYERS).record(0, stats(), {"c.weight": stats()})


def test_long_runs_are_thinned_and_keep_both_ends():
    history = SparsityHistory(LAYERS, limit=100)
    for step in range(1000):
        add(history, step)
        assert len(history) <= 100
        assert (history.steps[0], history.steps[-1]) == (0, step)
    gaps = [after - before for before, after in pairwise(history.steps)]
    assert len(history) == 100
    assert max(gaps) <= 24, "evenly spread would be 10"
    assert len(history.fractions) == len(history.series["strength"]) == len(history)


def test_a_limit_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="limit=3 is too small"):
        SparsityHistory(LAYERS, limit=3)


def test_phases():
    history = SparsityHistory(LAYERS)
    assert history.record_phase(0, "dense")
    assert not history.record_phase(5, "dense")
    assert history.record_phase(6, "sparsify")
    assert history.phases == [(0, "dense"), (6, "sparsify")]


def test_rewind():
    history = SparsityHistory(LAYERS)
    for step in (0, 10, 20):
        add(history, step)
    history.record_phase(0, "dense")
    history.record_phase(15, "sparsify")
    history.rewind(10)
    assert history.steps == [0, 10]
    assert history.phases == [(0, "dense")]


def test_the_state_survives_a_checkpoint_of_plain_types():
    history = SparsityHistory(LAYERS)
    add(history, 0)
    add(history, 10, 1 / 3, flips=0.125, strength=3.0)
    history.record_phase(0, "dense")
    history.record_metric(10, "val_loss", 2.5)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    copy = SparsityHistory.from_state_dict(torch.load(file, weights_only=True))
    assert (copy.layers, copy.steps, copy.fractions, copy.phases) == (
        history.layers,
        history.steps,
        history.fractions,
        history.phases,
    )
    assert (copy.metric_name, copy.metrics) == ("val_loss", [(10, 2.5)])
    assert copy.series.keys() == history.series.keys()
    for name, values in history.series.items():
        assert copy.series[name] == pytest.approx(values, nan_ok=True, abs=0)


def test_an_empty_history_has_a_state_too():
    assert len(SparsityHistory.from_state_dict(SparsityHistory(LAYERS).state_dict())) == 0


def test_a_history_of_version_2_is_read_without_losses():
    history = SparsityHistory(LAYERS)
    add(history, 0)
    state = history.state_dict()
    del state["metric_name"], state["metrics"], state["series"]["loss"]
    copy = SparsityHistory.from_state_dict({**state, "version": 2})
    assert copy.steps == [0]
    assert math.isnan(copy.series["loss"][0])


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="version 99 cannot be read"):
        SparsityHistory.from_state_dict({"version": 99})
