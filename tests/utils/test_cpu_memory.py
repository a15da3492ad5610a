"""The CPU memory that is left: of the machine, or of a container with less."""

from __future__ import annotations

import math

import pytest

from prox24_lightning.utils.devices import cpu_memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(cpu_memory, "_CONTAINER", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 300 kB\nMemAvailable:   200 kB\n")
    return tmp_path


@pytest.mark.parametrize(("limit", "left"), [("max", 200 * 1024), ("150000", 150000 - 1000), ("900000", 200 * 1024)])
def test_the_smaller_of_machine_and_container(machine, limit, left):
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text("1000\n")
    assert cpu_memory.available_memory() == left


def test_a_system_that_does_not_say_has_no_limit(machine):
    (machine / "meminfo").unlink()
    assert cpu_memory.available_memory() == math.inf
