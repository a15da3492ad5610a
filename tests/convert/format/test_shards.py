"""A packed model in several files with an index."""

from __future__ import annotations

import json

import pytest
import torch

from prox24_lightning.convert.format.shards import open_packed, write_packed_files
from prox24_lightning.mask import mask_24


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(8, 16) for name in "abc"} | {"a.bias": torch.randn(8)}
    for name in "abc":
        state[f"{name}.weight"] *= mask_24(state[f"{name}.weight"])
    state["tied.weight"] = state["a.weight"]
    dims = {f"{name}.weight": 1 for name in "abc"}
    return state, write_packed_files(tmp_path, state, dims, {"source": "test"}, max_bytes=600)


def test_several_files_are_read_as_one_state_dict(model, tmp_path):
    state, written = model
    assert len(written.files) == 3
    for found in (written, open_packed(tmp_path), open_packed(written.path)):
        assert set(found.names) == set(state)
        loaded = found.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        assert loaded["tied.weight"] is loaded["a.weight"]
        assert found.info == {"source": "test"}


def test_every_file_holds_the_fixed_scales_of_its_weights(model, tmp_path):
    state, _ = model
    scales = {f"{name}.weight": 0.25 * number for number, name in enumerate("abc", start=1)}
    folder = tmp_path / "rounded"
    folder.mkdir()
    found = write_packed_files(folder, state, dict.fromkeys(scales, 1), {}, 600, dict.fromkeys(scales, "int8"), scales)
    assert len(found.files) > 1
    assert {name: entry.input_scale for name, entry in found.packed.items()} == scales


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 200_000,
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "../packed.safetensors"}}',
        json.dumps({"weight_map": {"a": "x" * 5000}}),
    ],
    ids=lambda text: text[:40],
)
def test_an_index_that_is_none_is_refused(model, text):
    _, written = model
    written.path.write_text(text)
    with pytest.raises(ValueError, match="is no index of packed files: .*fetch or write the folder again"):
        open_packed(written.path)


@pytest.mark.parametrize("change", ["a tensor less", "a tensor more", "a tensor in another file"])
def test_an_index_that_does_not_list_what_the_files_hold_is_refused(model, change):
    _, written = model
    index = json.loads(written.path.read_text())
    names = index["weight_map"]
    first, other = sorted(set(names.values()))[:2]
    if change == "a tensor less":
        del names["b.weight.values"]
    elif change == "a tensor more":
        names["ghost"] = first
    else:
        names["a.bias"] = other if names["a.bias"] == first else first
    written.path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="do not belong together, they differ in"):
        open_packed(written.path)


def test_a_missing_or_damaged_file_is_named(model, tmp_path):
    _, written = model
    lost = written.files[1].path
    data = bytearray(lost.read_bytes())
    data[-1] ^= 1
    lost.write_bytes(data)
    with pytest.raises(ValueError, match=f"{lost.name} is damaged: the checksum of"):
        open_packed(tmp_path).state_dict()
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        open_packed(tmp_path)
