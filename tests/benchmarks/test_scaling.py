"""The tables of benchmarks.scaling, from made-up measurements, and the count of what is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import parts_of, projection, rows_of
from benchmarks.traffic import Traffic


def measured(gpus, step, pauses, sent, speed):
    names = ("without", "dense", "sparsify, progressive")
    return {
        "gpus": gpus,
        "tokens": 1000 * gpus,
        "times": {name: [step, step + 1, step, step] for name in names},
        "sent": dict.fromkeys(names, 2048),
        "pauses": pauses,
        "parts": [{part: float(number) for part in parts_of_a_pause()} for number in range(len(pauses))],
        "sent in a pause": [sent] * len(pauses),
        "gigabytes a second": speed,
    }


def parts_of_a_pause():
    from benchmarks.pause_parts import PARTS

    return PARTS


FOUND = [measured(1, 100.0, [9.0, 3.0, 3.0], 0, None), measured(2, 104.0, [9.0, 2.0, 2.0], 10**9, 10.0)]


def test_rows():
    rows = rows_of(FOUND)
    assert [(row["GPUs"], row["x 1 GPU"]) for row in rows][:4] == [(1, "1.00")] * 3 + [(2, "1.92")]
    assert rows[-1]["pause for a block, s"] == 2.0, "the first pause also compiles"
    assert rows[-1]["longest pause, s"] == 9.0
    assert rows[-1]["sent by us, KiB a step"] == 2.0
    assert parts_of(FOUND)[0] == {"part of a pause": "values kept for an undo", "1 GPU, s": 1.5, "2 GPU, s": 1.5}


def test_projection_agrees_with_what_was_measured():
    rows = {row["GPUs"]: row for row in projection(FOUND, samples=8)}
    # 3 = fixed + divided; 2 = fixed + divided / 2 + sending 0.1
    assert rows[1]["pause for a block, s"] == pytest.approx(3.0)
    assert rows[2]["pause for a block, s"] == pytest.approx(2.0)
    assert rows[1]["step without Prox24, ms"] == pytest.approx(100.0)
    assert rows[2]["step without Prox24, ms"] == pytest.approx(104.0)
    assert rows[64]["step without Prox24, ms"] == pytest.approx(100 + 4 * 2 * 63 / 64)
    assert rows[64]["pause for a block, s"] == pytest.approx(3 - 2.2 + 2.2 / 8 + 0.1 * 2 * 63 / 64)


def test_traffic_counts_tensors_and_objects(tmp_path):
    traffic = Traffic()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with traffic.counted():
            dist.all_reduce(torch.zeros(8))
            dist.all_gather([torch.zeros(4)], torch.zeros(4))
            counted = traffic.bytes
            dist.all_gather_object([None], "text")
        dist.all_reduce(torch.zeros(8))
    finally:
        dist.destroy_process_group()
    assert counted == 32 + 16
    assert counted < traffic.bytes < counted + 64
    assert traffic.calls == 3
