"""Samples of clock and power: medians after the settling, and no number without samples."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.convert_8bit_power import run_alone, sampled


def test_medians_leave_out_the_settling_and_cut_lines():
    early = ["1980, 120.00, Not Active"] * 3
    late = ["1400, 690.00, Active", "1410, 700.00, Active", "1420, 650.00, Not Active", "1430, 695.00, Active"]
    found = sampled("\n".join([*early, *late, "1500, 4"]))
    assert found == {"MHz": 1415.0, "W": 692.5, "at the limit %": 75.0}


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match=r"no samples \(Field x is not valid\)"):
        sampled("Field x is not valid\n")


@pytest.fixture
def gpu_that_is_sampled(monkeypatch, tmp_path):
    """A script in the place of nvidia-smi, which goes on for ever as that does; torch.cuda that only says yes."""
    script = tmp_path / "nvidia-smi"
    lines = "print('1400, 600.00, Active', flush=True)\n" * 5
    script.write_text(f"#!{sys.executable} -IS\nimport time\n{lines}time.sleep(60)\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("gpu_that_is_sampled")
def test_energy_is_power_times_time():
    found = run_alone(lambda: time.sleep(0.01), 2, 0.3)
    assert (found["MHz"], found["W"], found["at the limit %"]) == (1400, 600, 100)
    assert 5e3 <= found["us"] < 5e4
    assert found["mJ"] == pytest.approx(0.6 * found["us"])
