"""Kernels by name, and the table of which one runs when. No GPU needed."""

from __future__ import annotations

import pytest

from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel, kernel_for, own_kernels, parse_table

FEW = str(Kernel.few(TILINGS[0]))


@pytest.mark.parametrize("text", ["dense", "expand", "cusparselt", "cusparselt:17", FEW, "warpgroup:64,2,1,4,6"])
def test_a_kernel_is_its_text(text):
    assert str(Kernel.parse(text)) == text


def test_a_call_uses_the_next_count_above_its_own():
    table = f"8={FEW} 64=cusparselt:3 1024=cusparselt"
    assert parse_table(table)[0] == (8, 64, 1024)
    found = [str(kernel_for(table, tokens)) for tokens in (1, 8, 9, 64, 65, 1024, 5000)]
    assert found == [FEW, FEW, "cusparselt:3", "cusparselt:3", *["cusparselt"] * 3]


def test_on_hopper_the_older_kernel_is_measured_for_few_tokens_only():
    ways = {tokens: {kernel.name for kernel in own_kernels(tokens, (9, 0))} for tokens in (8, 64, 1024)}
    assert ways == {8: {"few", "warpgroup"}, 64: {"warpgroup"}, 1024: set()}
    assert {kernel.name for kernel in own_kernels(64, (8, 0))} == {"few"}
