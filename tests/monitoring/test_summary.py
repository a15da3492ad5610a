"""The closing table of a run."""

from __future__ import annotations

from prox24_lightning.monitoring.statistics import SparsityStats
from prox24_lightning.monitoring.summary import dense_warning, percent, summary_table


def stats(fraction):
    return SparsityStats(
        groups=10, zeros=(1 - fraction, 0, fraction, 0, 0), retained_squared_norm=0.9, penalty=1.0, rms=1.0
    )


def test_dense_warning_names_the_densest_first():
    layers = {"a": stats(1.0), "b": stats(0.9), "c": stats(0.0)}
    assert dense_warning(layers) == "2 of 3 weights are not 2:4: c (0.00 %), b (90.00 %)"
    assert dense_warning({"a": stats(1.0)}) is None
    assert dense_warning({f"l{i}": stats(0.5) for i in range(20)}).endswith(" and 12 more")


def test_many_layers_share_rows():
    layers = {f"layers.{i}.up.weight": stats(1.0) for i in range(60)}
    table = summary_table(layers, dict.fromkeys(layers, (4, 10)), "title")
    assert table.row_count == 1
    assert list(table.columns[0].cells) == ["layers.*.up (60 layers)"]
    assert list(table.columns[2].cells) == ["600"]


def test_percent_never_rounds_up_to_all():
    assert percent(1.0) == "100 %"
    assert percent(1 - 1e-9) == "99.99 %"
    assert percent(0.5) == "50.00 %"
