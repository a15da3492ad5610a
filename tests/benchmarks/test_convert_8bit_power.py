"""Samples of clock and power: medians after the settling, and no number without samples."""

from __future__ import annotations

import pytest

from benchmarks.convert_8bit_power import sampled


def test_medians_leave_out_the_settling_and_cut_lines():
    early = ["1980, 120.00, Not Active"] * 3
    late = ["1400, 690.00, Active", "1410, 700.00, Active", "1420, 650.00, Not Active", "1430, 695.00, Active"]
    found = sampled("\n".join([*early, *late, "1500, 4"]))
    assert found == {"MHz": 1415.0, "W": 692.5, "at the limit %": 75.0}


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no samples"):
        sampled("")
