"""The closing table of a run."""

from __future__ import annotations

import io

from rich.console import Console
from torch import nn

from prox24_lightning.monitoring.selection_table import selection_table
from prox24_lightning.monitoring.statistics import SparsityStats
from prox24_lightning.monitoring.summary import dense_warning, percent, print_next, summary_table
from prox24_lightning.weights.selection import GroupedWeight, Selection, SkippedWeight


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


def printed(table, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_the_tables_fit_80_columns_and_keep_names_apart():
    names = [f"model.language_model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 11) for p in "qk"]
    text = printed(summary_table(dict.fromkeys(names, stats(0.9)), dict.fromkeys(names, (14336, 16384)), "title"))
    assert "names begin with model.language_model.layers." in text
    rows = [line.split() for line in text.splitlines() if "proj" in line]
    assert len({row[0] for row in rows}) == 4
    assert all("…" not in "".join(row[1:]) for row in rows)
    assert text.count("14336 x 16384") == 4
    chosen = tuple(
        GroupedWeight(name, "", nn.Linear(16, 8), "weight", 1) for name in (names[0], names[1].replace("0", "5"))
    )
    skipped = (SkippedWeight("model.lm_head.weight", "Linear", (64, 256), "output head: the last layer of the model"),)
    text = printed(selection_table(Selection(chosen, skipped), "title"))
    assert "q_proj.weight" in text
    assert "k_proj.weight" in text
    assert "dense: output head: the last layer of the model" in " ".join(text.replace("│", " ").split())


def test_the_next_command_names_the_checkpoint(capsys):
    print_next("runs/last.ckpt")
    assert capsys.readouterr().out == "next: prox24 doctor runs/last.ckpt\n"
