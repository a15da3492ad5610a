"""The file of record: what was written comes back; what was damaged, cut, forged or written by others is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from safetensors import safe_open
from safetensors.torch import save_file

from prox24_lightning.mask import (
    StoredMask,
    check,
    hash_weight,
    mask_24,
    pack_mask,
    packing,
    read_masks,
    write_masks,
)
from prox24_lightning.utils.checksum import checksum

FULL_DISK = """
import resource, signal, torch
from prox24_lightning.mask import StoredMask, write_masks
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_masks({path!r}, {{"w": StoredMask(torch.zeros(64, 1024, dtype=torch.bool), 1)}})
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def some_masks():
    torch.manual_seed(0)
    weight, filters = torch.randn(6, 8), torch.randn(3, 4, 3, 3)
    return {
        "a.weight": StoredMask(mask_24(weight), 1, hash_weight(weight)),
        "b.weight": StoredMask(mask_24(weight.T.contiguous(), dim=0), 0),
        "c.conv": StoredMask(mask_24(filters, dim=1), 1, hash_weight(filters)),
        "c.block": StoredMask(mask_24(torch.randn(8, 4), dim=(0, 1)), (0, 1)),
        "d.none": StoredMask(torch.zeros(0, 4, dtype=torch.bool), 1),
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].mask, stored.mask)
        and (found[name].dim, found[name].weight_hash) == (stored.dim, stored.weight_hash)
        for name, stored in expected.items()
    )


def test_masks_come_back_as_they_were(tmp_path):
    info = {"step": 12, "settings": {"start": 0.5, "targets": None}}
    path = write_masks(tmp_path / "masks.safetensors", some_masks(), info)
    file = read_masks(path)
    assert same(file.masks, some_masks())
    assert file.info == info


def test_a_mask_takes_one_bit_a_weight(tmp_path):
    mask = mask_24(torch.randn(512, 512))
    path = write_masks(tmp_path / "m", {"w": StoredMask(mask, 1)})
    assert path.stat().st_size < 512 * 512 / 8 + 1024


def test_the_hash_sees_values_shape_and_dtype_but_not_the_memory_layout():
    weight = torch.randn(4, 8)
    known = hash_weight(weight)
    assert hash_weight(weight.T.contiguous().T) == known
    others = [weight + 1e-6, weight.view(8, 4), weight.double(), weight.bfloat16()]
    assert known not in [hash_weight(other) for other in others]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": "pt"}, r"is no masks file of prox24_lightning \(its format is 'pt'\)"),
        ({"version": "2"}, "is of version '2', this release reads 1; update"),
        ({"info": "{}"}, "is damaged: its checksum does not fit"),
        ({"sha256": "0"}, "is damaged: its checksum does not fit"),
    ],
)
def test_other_files_and_later_versions_are_refused(tmp_path, change, words):
    path = write_masks(tmp_path / "m.safetensors", some_masks(), {"step": 1})
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={**metadata, **change})
    with pytest.raises(ValueError, match=words):
        read_masks(path)


GOOD = {"shape": [2, 8], "dim": 1, "weight_sha256": None}


@pytest.mark.parametrize(
    "masks, words",
    [
        ("[]", "its JSON is no object"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", r"described are \[\], stored \['w'\]"),
        ({"w": 3}, "w has no sound shape"),
        ({"w": {**GOOD, "shape": [2, -8]}}, "w has no sound shape"),
        ({"w": {**GOOD, "shape": [True, 8]}}, "w has no sound shape"),
        ({"w": {**GOOD, "dim": "1"}}, "w has no sound dim or hash"),
        ({"w": {**GOOD, "dim": [0, "1"]}}, "w has no sound dim or hash"),
        ({"w": {**GOOD, "dim": [1, 1]}}, "the mask of w: .* must name two different dimensions"),
        ({"w": {**GOOD, "dim": 5}}, "the mask of w: dim=5 is out of range"),
        ({"w": {**GOOD, "shape": [2**30, 2**30]}}, "which 2 bytes cannot hold"),
        ({"w": {**GOOD, "shape": [2**40, 2**30]}}, "w has no sound shape"),
        ({"w": {**GOOD, "shape": []}}, "w has no sound shape"),
        ({"w": {**GOOD, "shape": [1] * 100_000}}, "w has no sound shape"),
        ({"w": {**GOOD, "shape": [2, 4]}}, "do not belong to a mask of shape"),
        ({"w": {**GOOD, "shape": [8, 2]}}, "dimension 1 .* does not divide by 4"),
        ({"w": {**GOOD, "shape": [16], "dim": 0}}, "is not 2:4 along dimension 0: 1 groups keep more than two"),
    ],
)
def test_forged_files_with_a_right_checksum_are_refused(tmp_path, masks, words):
    """Someone who can compute the checksum can still not make the reader allocate, recurse or believe nonsense."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    packed = {"w": pack_mask(mask)}
    with pytest.raises(ValueError, match=f"forged or broken masks file: .*{words}"):
        read_masks(forged(tmp_path / "m", masks, packed))


def forged(path, masks, packed):
    header = {"version": "1", "masks": masks if isinstance(masks, str) else json.dumps(masks), "info": "{}"}
    digest = checksum([header, *(part for name in sorted(packed) for part in (f"{name} ", packed[name]))])
    save_file(packed, path, metadata={"format": "prox24 masks", **header, "sha256": digest})
    return path


@pytest.mark.parametrize("shape", [[4 * 10**18, 0], [0, 2**62], [4, 0, 10**12], [10**15, 4, 0]])
def test_an_empty_mask_of_a_huge_shape_is_refused_at_once(tmp_path, shape):
    path = forged(tmp_path / "m", {"w": {**GOOD, "shape": shape, "dim": 0}}, {"w": torch.zeros(0, dtype=torch.uint8)})
    started = time.perf_counter()
    with pytest.raises(ValueError, match="w has no sound shape"):
        read_masks(path)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("shape, dim", [((4, 2**20), 1), ((2**20, 4), 1), ((2**20, 4), 0), ((8, 512, 1024), 1)])
def test_reading_takes_the_memory_of_the_masks_and_a_little(tmp_path, monkeypatch, shape, dim):
    monkeypatch.setattr(check, "ENTRIES_AT_A_TIME", 2**12)
    monkeypatch.setattr(packing, "BYTES_AT_A_TIME", 2**9)
    one = torch.zeros(shape, dtype=torch.bool)
    path = write_masks(tmp_path / "m", {"a": StoredMask(one, dim), "b": StoredMask(one, dim)})
    with LiveBytes() as live:
        read_masks(path)
    assert live.peak <= 2 * one.nbytes + path.stat().st_size + 2**17


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path):
    path = write_masks(tmp_path / "m", some_masks(), {"step": 1})
    old = path.read_bytes()
    code = FULL_DISK.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "OSError 27\n"
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


def test_a_file_that_is_not_there_and_one_that_is_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no masks file"):
        read_masks(tmp_path / "none.safetensors")
    torch.save({"w": torch.ones(4)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_masks(tmp_path / "pickle.pt")


def test_what_is_not_a_24_mask_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="the mask of w is not 2:4 along dimension 0: 1 groups keep more than two"):
        write_masks(tmp_path / "m", {"w": StoredMask(torch.tensor([True, True, True, False]), 0)})
    with pytest.raises(TypeError, match="takes a bool mask"):
        write_masks(tmp_path / "m", {"w": StoredMask(torch.zeros(4), 0)})
    assert list(tmp_path.iterdir()) == []


def test_a_row_mask_is_not_written_as_one_of_blocks(tmp_path):
    mask = torch.tensor([[True, True, False, False]] * 4)
    with pytest.raises(ValueError, match=r"is not 2:4 along dimension \(0, 1\): 2 groups keep more than two"):
        write_masks(tmp_path / "masks.safetensors", {"a": StoredMask(mask, (0, 1))})


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return write_masks(folder / "m", some_masks(), {"step": 3}).read_bytes(), folder / "damaged"


def read_or_refuse(content, path):
    path.write_bytes(content)
    try:
        return read_masks(path)
    except ValueError:
        return None


def test_a_type_that_torch_lacks_is_refused(tmp_path):
    tensor = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    header = json.dumps({"__metadata__": {"format": "prox24 masks", "version": "1"}, "w": tensor}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        read_masks(path)


@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bits_are_refused_or_change_nothing(whole_file, data):
    content, path = whole_file
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = read_or_refuse(bytes(damaged), path)
    assert file is None or (same(file.masks, some_masks()) and file.info == {"step": 3})


@settings(max_examples=150)
@given(data=st.data())
def test_a_file_cut_short_or_with_bytes_put_in_is_refused(whole_file, data):
    content, path = whole_file
    at = data.draw(st.integers(0, len(content) - 1))
    inserted = data.draw(st.binary(min_size=1, max_size=8))
    assert read_or_refuse(content[:at], path) is None
    file = read_or_refuse(content[:at] + inserted + content[at:], path)
    assert file is None or same(file.masks, some_masks())


@settings(max_examples=150)
@given(content=st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(whole_file, content):
    assert read_or_refuse(content, whole_file[1]) is None


WIDE = (2**62).to_bytes(8, "little")
ODD_HEADERS = [
    {"data_offsets": [0, 2**60]},
    {"data_offsets": [-1, 4]},
    {"data_offsets": [4, 0]},
    {"data_offsets": [1, 5]},
    {"shape": [2**62, 4]},
    {"shape": [2**31, 2**31, 2**31]},
    {"shape": [-4]},
    {"shape": ["4"]},
    {"dtype": "F64"},
    {"dtype": "F4"},
]


@pytest.mark.parametrize("odd", ODD_HEADERS, ids=str)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path, odd):
    raw = write_masks(tmp_path / "m", {"w": StoredMask(torch.zeros(4, 8, dtype=torch.bool), 1)}).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["w"].update(odd)
    text = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(ValueError, match="m cannot be read as safetensors|m is damaged"):
        read_masks(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", bytes(8), WIDE, WIDE + b"{}", (10**8).to_bytes(8, "little") + b"{" * 1000])
def test_a_file_that_is_all_header_or_none_is_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match="m cannot be read as safetensors"):
        read_masks(tmp_path / "m")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "w"]), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(shape=json_values, dim=json_values, digest=json_values, dtype=st.sampled_from([torch.uint8, torch.float32]))
def test_entries_of_any_kind_with_a_right_checksum_are_refused_or_sound(whole_file, shape, dim, digest, dtype):
    entries = {"w": {"shape": shape, "dim": dim, "weight_sha256": digest}}
    path = forged(whole_file[1].with_name("forged"), entries, {"w": torch.zeros(2, dtype=dtype)})
    try:
        masks = read_masks(path).masks
    except ValueError:
        return
    assert masks["w"].mask.shape == tuple(shape)
