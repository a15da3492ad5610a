"""The maths of the study, against what is known of it."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.mask import is_24
from prox24_lightning.solvers.loss import row_losses
from prox24_lightning.study import ablations, failures, fractions
from prox24_lightning.study.local_global import gaps, mean_gaps, random_layer
from prox24_lightning.study.plane import path, plane


def test_the_plane_is_symmetric_and_jumps_only_between_supports():
    found = plane(0.6, 0.5, resolution=120)
    assert torch.equal(found.kept, found.kept.T)
    assert set(found.kept.unique().tolist()) == {2, 3, 4}
    assert found.kept[-1, -1] == 2
    assert found.jump.any()
    assert not plane(0.05, 0.02, resolution=120, largest=0.4).jump.any(), "convex there"


def test_a_path_begins_at_the_group_and_ends_at_its_two_largest():
    found = path([1.0, 0.95, 0.9, 0.85], points=50)
    assert torch.equal(found.values[0], found.group)
    assert found.values[-1].tolist() == [1.0, 0.95, 0.0, 0.0]
    before = found.values[found.strengths < found.critical]
    after = found.values[found.strengths > found.critical]
    assert (before.count_nonzero(1) > 2).all()
    assert (after.count_nonzero(1) == 2).all()


@pytest.mark.parametrize("geometry, inputs", [("row", (8, 16)), ("block", (8, 12))])
def test_prox_has_the_smallest_mean_gap_at_correlation_09(geometry, inputs):
    table = gaps(geometry, correlations=[0.9], sizes=inputs, layers=1, rows=16)
    means = mean_gaps(table, 0.9)
    assert min(means, key=means.__getitem__) == "prox"
    assert all(row["gap"] >= row["gap_refined"] - 1e-9 for row in table)
    assert all(row["gap_refined"] > -1e-9 for row in table)


def test_shares_grow_with_the_strength_and_blocks_are_last_to_start():
    table = fractions.shares("gaussian", fractions.synthetic("gaussian", 64), [0.05, 0.5, 5.0, 500.0])
    for geometry in ("row", "column", "block"):
        values = [row[geometry] for row in table]
        assert values == sorted(values)
        assert values[-1] == 1.0
    assert table[0]["block"] <= table[0]["row"]


def test_heavy_tails_become_24_over_more_decades_of_strength():
    strengths = [0.02 * 1.5**i for i in range(22)]
    table = []
    for kind in ("gaussian", "heavy tails"):
        table += fractions.shares(kind, fractions.synthetic(kind, 64), strengths)
    decades = fractions.switch_decades(table, "row")
    assert 0 < decades["gaussian"] < decades["heavy tails"]
    assert fractions.switch_decades(table[:3], "row") == {}, "90 % are never reached"


def test_heavy_tails_are_heavy():
    heavy, normal = (fractions.synthetic(kind, 256) for kind in ("heavy tails", "gaussian"))
    assert heavy.abs().max() / heavy.std() > 2 * normal.abs().max() / normal.std()


def test_retained_norms_are_ordered():
    found = fractions.retained_norms("gaussian", fractions.synthetic("gaussian", 64))
    assert found["rows, then columns"] < found["block (90 masks)"] < found["block (at most two)"] < found["row"] < 1


def test_what_splitting_reaches_is_never_below_the_best_known():
    table = fractions.splitting_gaps(fractions.synthetic("gaussian", 48), [0.1, 0.5], starts=2)
    assert all(row["gap"] > -1e-9 for row in table)
    by_way = {row["way"]: row["gap"] for row in table if row["strength"] == 0.5}
    assert by_way["dykstra 5 + descent 2"] < by_way["projection"]


def test_the_search_counts_and_shows_the_worst_row():
    table, worst = failures.search(layers=1, rows=64)
    assert [row["rival"] for row in table] == ["wanda", "sparsegpt"]
    for row in table:
        assert row["rows"] == 64
        assert 0 <= row["prox_worse"] < row["prox_better"] < 1
        assert row["prox_over_best"] >= -1e-9
    for failure in worst:
        assert failure.losses["best"] <= min(failure.losses.values()) * (1 + 1e-9)
        assert all(len(kept) == 4 for kept in failure.masks.values())


def test_ablations_change_one_thing_at_a_time_and_are_all_24():
    weight, hessian = random_layer(16, 16, 0.5, torch.Generator().manual_seed(0))
    seen = []

    def score(pruned):
        seen.append(pruned["a"])
        return float(row_losses(pruned["a"], weight, hessian).sum())

    table = ablations.ablate({"a": (weight, hessian)}, score, steps=(5, 20), base=10)
    rows = {row["variant"]: row for row in table}
    assert {"steps: 5", "steps: 20", "metric: weights alone", "geometry: block", "no prox: wanda"} <= set(rows)
    assert len(seen) == 2 * len(table)
    for index, name in enumerate(rows):
        dims = {"geometry: column": [0], "geometry: block": [0, 1]}.get(name, [1])
        assert all(is_24(found, dim=dim) for dim in dims for found in seen[2 * index : 2 * index + 2])
        assert rows[name]["loss_refined"] <= rows[name]["loss"] * (1 + 1e-9)
