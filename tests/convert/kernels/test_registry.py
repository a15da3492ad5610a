"""Kernels by name, and the table of which one runs when. No GPU needed."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import (
    Kernel,
    dense_fp8_kernels,
    is_packed_kernel,
    kernel_for,
    missing_inputs,
    own_kernels,
    parse_table,
    prepare,
)

FEW = str(Kernel.few(TILINGS[0]))


@pytest.mark.parametrize(
    "text",
    ["dense", "expand", "cusparselt", "cusparselt:17", FEW, "warpgroup:64,2,1,4,6", "many:256,2,2,8", "dense_fp8:1"],
)
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


def test_kernels_of_8_bits_by_gpu():
    def names(tokens, capability, form):
        return {kernel.name for kernel in own_kernels(tokens, capability, form)}

    assert names(8, (9, 0), "fp8_e4m3") == {"warpgroup"}
    assert names(8, (9, 0), "int8") == {"few", "warpgroup"}
    assert names(512, (9, 0), "int8") == {"warpgroup", "many"}
    assert names(4096, (9, 0), "fp8_e4m3") == {"many"}
    assert names(8, (8, 0), "int8") == names(8, (8, 9), "fp8_e4m3") == {"few"}
    assert names(8, (8, 6), "fp8_e4m3") == set()
    assert names(4096, (9, 0), None) == set()
    assert [str(kernel) for kernel in dense_fp8_kernels((8, 9))] == ["dense_fp8:0", "dense_fp8:1"]
    assert dense_fp8_kernels((8, 6)) == ()


def test_only_kernels_of_this_release_count_from_a_file():
    assert is_packed_kernel("many:256,2,2,8")
    assert is_packed_kernel("many:256,2,2,4,1")
    assert not is_packed_kernel("many:256,2,2,8,0"), "a last 0 is not written, as in earlier versions"
    assert not is_packed_kernel("many:256,2,2,9000")
    assert not is_packed_kernel("dense_fp8:0"), "its weight is not packed"


def test_tokens_are_padded_for_kernels_that_do_not_round_them():
    shape = (64, 100)
    assert missing_inputs(Kernel("cusparselt"), shape) == 28
    assert missing_inputs(Kernel("dense"), shape) == 0
    assert missing_inputs(Kernel("cusparselt"), shape, "int8") == missing_inputs(Kernel("dense_fp8"), shape) == 0


def test_many_tokens_multiplies_8_bits_only():
    with pytest.raises(ValueError, match="weights of 8 bits only"):
        prepare(Kernel.parse("many:256,2,2,8"), torch.bfloat16, (64, 128), 256, 0)
