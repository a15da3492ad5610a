"""Measured times on disk. No GPU needed."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import BUCKETS, KernelTimes, choose
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel, own_kernels
from prox24_lightning.utils.file_lock import locked

SHAPE = (4096, 1024)
MACHINE = Machine("some GPU", "580.1", "2.11", "800", "abc")
FEW = str(Kernel.few(TILINGS[0]))


def test_measured_times_come_back_from_disk(tmp_path):
    path = tmp_path / "folder" / "kernels.json"
    entry = KernelTimes(8, 10.5, {FEW: 6.25}, ("a note",))
    where = disk_cache.key(MACHINE, torch.float16, SHAPE, 8)
    disk_cache.add(path, {where: entry})
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, 64): replace(entry, tokens=64)})
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE, (1, 8, 64)) == {8: entry, 64: replace(entry, tokens=64)}
    assert {file.name for file in path.parent.iterdir()} == {"kernels.json", "kernels.json.lock"}


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "cusparselt", "kernels"])
def test_times_of_another_machine_are_not_used(tmp_path, field):
    path = tmp_path / "kernels.json"
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, 8): KernelTimes(8, 10.0, {})})
    assert disk_cache.find(path, replace(MACHINE, **{field: "other"}), torch.float16, SHAPE, (8,)) == {}
    assert disk_cache.find(path, MACHINE, torch.bfloat16, SHAPE, (8,)) == {}
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE[::-1], (8,)) == {}


def test_an_entry_without_kernels_is_measured_again(tmp_path):
    path = tmp_path / "kernels.json"
    disk_cache.add(
        path, {disk_cache.key(MACHINE, torch.float16, SHAPE, 8): KernelTimes(8, 10.0, {}, ("out of memory",))}
    )
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE, (8,)) == {}


ENTRY = {"tokens": 8, "dense_us": 14.0, "kernels": {FEW: 9.0}, "notes": []}


def file_text(**changes) -> str:
    """A file with one entry, its values changed as no measurement does it."""
    return json.dumps({"version": 1, "entries": {"key": {**ENTRY, **changes}}})


DAMAGED_FILES = {
    "empty": "",
    "cut short": file_text()[:-9],
    "a list": "[]",
    "no entries": '{"version": 1}',
    "entries in a list": '{"version": 1, "entries": [1]}',
    "an entry that is a number": '{"version": 1, "entries": {"key": 1}}',
    "nested": "[" * 200_000,
    "a number of 5000 digits": file_text(tokens=0).replace('"tokens": 0', f'"tokens": {"9" * 5000}'),
    "tokens without end": file_text(tokens=0).replace('"tokens": 0', '"tokens": 1e999'),
    "a time of 400 digits": file_text().replace("14.0", "9" * 400),
    "a text for tokens": file_text(tokens="8"),
    "half a token": file_text(tokens=8.5),
    "no tokens": file_text(tokens=0),
    "true for tokens": file_text(tokens=True),
    "dense time NaN": file_text(dense_us=math.nan),
    "dense time negative": file_text(dense_us=-14.0),
    "dense time zero": file_text(dense_us=0),
    "dense time a text": file_text(dense_us="14"),
    "kernels in a list": file_text(kernels=[FEW]),
    "no kernels": file_text(kernels=None),
    "a note that is a number": file_text(notes=[1]),
    "notes in a text": file_text(notes="none"),
    "dense float8 time zero": file_text(dense_fp8_us=0),
    "dense float8 time a text": file_text(dense_fp8_us="9"),
}


@pytest.mark.parametrize("text", DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, caplog, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    assert disk_cache.read(path) == {}
    assert disk_cache.read(path) == {}
    assert len(caplog.records) == 1, "one warning, though the file is read for each layer"
    assert str(path) in caplog.text
    disk_cache.add(path, {"key": KernelTimes(8, 10.0, {FEW: 9.0})})
    assert set(disk_cache.read(path)) == {"key"}


@pytest.mark.parametrize(
    "kernels",
    [
        {"nonsense:1": 9.0},
        {"dense": 9.0},
        {"few:0,1,1,1,17,1,2,2,2": 9.0},
        {"few:0,1,1,1": 9.0},
        {f" {FEW}": 9.0},
        {"warpgroup:64,2,1,4,6000": 9.0},
        {"cusparselt:99999": 9.0},
        {"cusparselt:-1": 9.0},
        {"cusparselt:": 9.0},
        {"torch:1": 9.0},
        {FEW: -5.0},
        {FEW: 0.0},
        {FEW: math.nan},
        {FEW: math.inf},
        {FEW: "9"},
        {FEW: True},
        {FEW: 0.2},  # 70 times as fast as cuBLAS
        {FEW: 9.0, "cusparselt:7": -1.0},
    ],
    ids=str,
)
def test_an_entry_with_an_impossible_kernel_counts_as_not_measured(tmp_path, caplog, kernels):
    path = tmp_path / "kernels.json"
    where = disk_cache.key(MACHINE, torch.float16, SHAPE, 8)
    good = disk_cache.key(MACHINE, torch.float16, SHAPE, 64)
    entries = {where: {**ENTRY, "kernels": kernels}, good: {**ENTRY, "tokens": 64}}
    path.write_text(json.dumps({"version": 1, "entries": entries}))
    assert set(disk_cache.find(path, MACHINE, torch.float16, SHAPE)) == {64}
    assert "1 of 2 entries are damaged" in caplog.text
    disk_cache.add(path, {where: KernelTimes(8, 10.0, {FEW: 9.0})})
    assert set(disk_cache.find(path, MACHINE, torch.float16, SHAPE)) == {8, 64}


def test_every_kernel_that_is_measured_is_valid(tmp_path):
    forms = (None, "fp8_e4m3", "int8")
    own = {
        kernel
        for tokens in BUCKETS
        for gpu in ((8, 0), (8, 9), (9, 0))
        for form in forms
        for kernel in own_kernels(tokens, gpu, form)
    }
    kernels = [*map(str, own), "cusparselt:0", "cusparselt:36", "cusparselt", "torch", "expand"]
    entry = KernelTimes(8, 10.0, dict.fromkeys(kernels, 5.0))
    disk_cache.add(tmp_path / "kernels.json", {"key": entry})
    assert disk_cache.read(tmp_path / "kernels.json") == {"key": entry}


def test_an_entry_under_the_key_of_another_number_of_tokens_is_not_used(tmp_path):
    path = tmp_path / "kernels.json"
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, 64): KernelTimes(8, 10.0, {FEW: 9.0})})
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE, (8, 64)) == {}


def test_a_file_of_another_release_is_left_out_without_a_warning(tmp_path, caplog):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"version": 99, "entries": [ENTRY]}))
    assert disk_cache.read(path) == {}
    assert not caplog.records


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_never_raises_and_leaves_possible_times_only(tmp_path, data):
    path = tmp_path / "kernels.json"
    text = bytearray(json.dumps({"version": 1, "entries": {f"k{n}": ENTRY for n in range(3)}}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(text[: data.draw(st.integers(0, len(text)))])
    for entry in disk_cache.read(path).values():
        assert entry.tokens >= 1
        assert all(0 < us < 1e9 for us in (entry.dense_us, *entry.kernels.values()))
        if entry.kernels:
            kernel = choose(SHAPE, [entry]).rows[0].kernel
            assert str(kernel) in (FEW, "torch", "expand") or kernel.name == "cusparselt"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_counts_as_empty_and_is_not_replaced(tmp_path, caplog, kind):
    path = tmp_path / "kernels.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    else:
        path.symlink_to("/dev/zero")
    assert disk_cache.read(path) == {}
    assert "no regular file" in caplog.text
    with pytest.raises(OSError, match="no regular file"):
        disk_cache.add(path, {"key": KernelTimes(8, 10.0, {FEW: 9.0})})
    assert not path.is_file()


def test_a_file_that_may_not_be_read_counts_as_empty(tmp_path, monkeypatch, caplog):
    path = tmp_path / "kernels.json"
    path.write_text(file_text())

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert disk_cache.read(path) == {}
    assert "PermissionError: not yours" in caplog.text


def test_a_file_of_gigabytes_is_not_read(tmp_path, caplog):
    path = tmp_path / "kernels.json"
    with path.open("wb") as file:
        file.truncate(2**32)
    assert disk_cache.read(path) == {}
    assert "it has 4294967296 bytes" in caplog.text


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "kernels.json"

    def write(writer: int) -> None:
        for tokens in range(1, 9):
            disk_cache.add(path, {f"{writer} {tokens}": KernelTimes(tokens, 10.0, {FEW: 9.0})})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(disk_cache.read(path)) == 64


def test_a_writer_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "kernels.json"
    with locked(tmp_path / "kernels.json.lock"):
        disk_cache.add(path, {"key": KernelTimes(8, 10.0, {FEW: 9.0})})
    assert set(disk_cache.read(path)) == {"key"}


def test_without_a_home_the_cache_is_a_temporary_file(monkeypatch):
    monkeypatch.delenv("PROX24_KERNEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert disk_cache.default_path().parts[-2:] == ("prox24_lightning", "kernels.json")


def test_the_path_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PROX24_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.default_path() == tmp_path / "prox24_lightning" / "kernels.json"
    monkeypatch.setenv("PROX24_KERNEL_CACHE", str(tmp_path / "mine.json"))
    assert disk_cache.default_path() == tmp_path / "mine.json"


def test_forms_have_entries_of_their_own(tmp_path):
    path = tmp_path / "kernels.json"
    entries = {
        form: KernelTimes(8, 10.0, {FEW: us}, (), 8.5, "dense_fp8:1")
        for form, us in ((None, 9.0), ("fp8_e4m3", 5.0), ("int8", 4.0))
    }
    for form, entry in entries.items():
        disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, 8, form): entry})
    for form, entry in entries.items():
        assert disk_cache.find(path, MACHINE, torch.float16, SHAPE, (8,), form=form) == {8: entry}
    assert disk_cache.find(path, MACHINE, torch.bfloat16, SHAPE, (8,), form="int8") == {}


def test_an_entry_without_a_time_in_float8_is_read(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(file_text())
    assert disk_cache.read(path)["key"].dense_fp8_us is None
    path.write_text(file_text(dense_fp8_us=9.0, dense_fp8_kernel="cusparselt"))
    found = disk_cache.read(path)["key"]
    assert (found.dense_fp8_us, found.dense_fp8_kernel) == (9.0, "")
