"""Measured times on disk. No GPU needed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import (
    KernelTimes,
)
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel

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
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]


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


OTHER_VERSION = json.dumps(
    {"version": 99, "entries": {"old": {"tokens": 8, "dense_us": 1.0, "kernels": {}, "notes": []}}}
)


@pytest.mark.parametrize("text", ["", "{", "[]", OTHER_VERSION, '{"version": 1, "entries": [1]}'])
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    assert disk_cache.read(path) == {}
    disk_cache.add(path, {"key": KernelTimes(8, 10.0, {})})
    assert set(disk_cache.read(path)) == {"key"}


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PROX24_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.default_path() == tmp_path / "prox24_lightning" / "kernels.json"
    monkeypatch.setenv("PROX24_KERNEL_CACHE", str(tmp_path / "mine.json"))
    assert disk_cache.default_path() == tmp_path / "mine.json"
