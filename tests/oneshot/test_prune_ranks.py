"""prune_layerwise over two processes: batches and rows are shared out, and both end with what one process finds."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from new_processes import spawn
from tiny_blocks import batches, prune, seeded

from prox24_lightning.oneshot.block_inputs import BlockInputs

pytestmark = pytest.mark.slow

CASES = {
    "prox": {"dense_target": 0.5, "steps": 10},
    "wanda": {"method": "wanda", "budget": 0.2},
    "column": {"geometry": "column", "method": "sparsegpt"},
}


def work(rank, folder):
    dist.init_process_group("gloo")
    seen = []
    recorded = BlockInputs.recorded

    @contextmanager
    def spy(*args, **options):
        with recorded(*args, **options) as inputs:
            seen.append(len(inputs))
            yield inputs

    BlockInputs.recorded = spy
    found = {}
    for name, options in CASES.items():
        model = seeded()
        report = prune(model, batches(4), work_dir=folder / name, offload=str(folder / "hidden"), **options)
        found[name] = {"weights": model.state_dict(), "tokens": report.layers[0].tokens, "batches": seen[-1]}
    again = seeded()
    report = prune(again, batches(4), work_dir=folder / "prox", **CASES["prox"])
    found["again"] = {"weights": again.state_dict(), "tokens": report.layers[0].tokens, "batches": 0}
    words = {}
    bad = batches(4)
    bad[1][0] = float("inf")
    for name, data, options in (
        ("bad input", bad, {}),
        ("too few", batches(1), {}),
        ("other settings", batches(4), {"work_dir": folder / "prox", "method": "wanda"}),
    ):
        try:
            prune(seeded(), data, **options)
        except ValueError as error:
            words[name] = str(error)
    torch.save({"found": found, "words": words}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_with_what_one_process_finds(ranks, case):
    first, second = (rank["found"][case] for rank in ranks)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert (first["batches"], second["batches"]) == (2, 2)
    model = seeded()
    report = prune(model, batches(4), **CASES[case])
    assert first["tokens"] == second["tokens"] == report.layers[0].tokens
    for name, value in model.state_dict().items():
        same = (first["weights"][name] != 0) == (value != 0)
        assert same.float().mean() > 0.98
        rows = same.flatten(1).all(1) if value.dim() > 1 else same
        torch.testing.assert_close(first["weights"][name][rows], value[rows], rtol=0, atol=2e-2)


def test_finished_blocks_are_taken_over(ranks):
    for rank in ranks:
        again, before = rank["found"]["again"]["weights"], rank["found"]["prox"]["weights"]
        assert all(torch.equal(value, before[name]) for name, value in again.items())


def test_errors_are_raised_on_every_rank(ranks):
    for rank in ranks:
        assert "inputs hold values that are not finite" in rank["words"]["bad input"]
        assert "holds blocks of another run: dense_target was 0.5 and is now 0.0" in rank["words"]["other settings"]
        assert "one for each of the 2 processes" in rank["words"]["too few"]
