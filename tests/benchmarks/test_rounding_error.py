"""The errors that the guide quotes: which form is finest, and what outliers do to it."""

from __future__ import annotations

from benchmarks.rounding_error import relative_errors


def test_int8_is_finer_than_fp8_until_inputs_have_outliers():
    gaussian = relative_errors(64, 512, 32)
    assert gaussian["bf16"] < gaussian["int8"] / 2 < gaussian["fp8_e4m3"] / 4
    outliers = relative_errors(64, 512, 32, outlier=10.0)
    assert outliers["int8"] > 2 * gaussian["int8"]
    assert abs(outliers["fp8_e4m3"] / gaussian["fp8_e4m3"] - 1) < 0.2
