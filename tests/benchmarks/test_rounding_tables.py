"""The table of what 8 bits cost: which rows it has, and above what each is measured."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_language import Chains, save_tiny_llama

from benchmarks.rounding import main
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.selection import select_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, and the same model pruned."""
    dense, pruned = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("pruned")
    source = Pretrained(save_tiny_llama(dense))
    network = source.model()
    with torch.no_grad():
        for weight in select_weights(network).chosen:
            weight.parameter.mul_(mask_24(weight.parameter))
    network.save_pretrained(pruned)
    source.tokenizer().save_pretrained(pruned)
    return source, str(pruned)


def rows_of(folders, output, **options):
    source, checkpoint = folders
    settings = {"sequences": 4, "length": 16, "batch_size": 2, "eval_sequences": 4, "dtype": "float32", "device": "cpu"}
    data = {"data": Chains(60), "other": Chains(20)}
    main(output, source, checkpoint, **settings, **data, **options)
    (file,) = output.glob("rounding/*.json")
    return {(row["weights"], row["inputs"]): row for row in json.loads(file.read_text())["rows"]}


def test_a_checkpoint_is_measured_against_itself_and_against_a_baseline(folders, tmp_path):
    rows = rows_of(folders, tmp_path, baseline=folders[1], plain=True, forms=["int8"])
    assert list(rows) == [
        ("dense", "float32"),
        ("dense, int8", "float32"),
        ("dense, int8", "rounded"),
        ("2:4", "float32"),
        ("2:4, int8 plain", "float32"),
        ("2:4, int8 plain", "rounded"),
    ]
    assert rows["2:4", "float32"]["ppl stdlib +% baseline"] == pytest.approx(0)
    assert rows["dense", "float32"]["ppl stdlib +% baseline"] != pytest.approx(0)
    for row in list(rows.values())[3:]:
        assert row["ppl libraries +%"] == pytest.approx(row["ppl libraries +% baseline"])


def test_without_a_baseline_layers_are_solved_too(folders, tmp_path):
    rows = rows_of(folders, tmp_path, reconstruct_steps=0, tune_steps=[2], forms=["fp8_e4m3"])
    assert [row for row in rows if "on the mask" in row[0]] == [
        ("2:4, fp8_e4m3 on the mask", "float32"),
        ("2:4, fp8_e4m3 on the mask", "rounded"),
        ("2:4, fp8_e4m3 on the mask, 2 steps of all layers at 0.001", "float32"),
        ("2:4, fp8_e4m3 on the mask, 2 steps of all layers at 0.001", "rounded"),
    ]
    assert not any("baseline" in column for column in rows["dense", "float32"])
