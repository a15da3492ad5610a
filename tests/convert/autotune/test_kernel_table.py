"""The choice of kernels from measured times or by rule. No GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import (
    BUCKETS,
    DENSE,
    KernelTable,
    KernelTimes,
    TableRow,
    choose,
    completed,
    table_by_rule,
)
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel, kernel_for

SHAPE = (4096, 1024)
FEW = str(Kernel.few(TILINGS[0]))


def times(tokens: int, dense: float, **kernels: float) -> KernelTimes:
    return KernelTimes(tokens, dense, {{"few": FEW, "plan": "cusparselt:7"}[name]: us for name, us in kernels.items()})


MACHINE = Machine("some GPU", "580.1", "2.11", "800", "abc")


def test_the_fastest_packed_kernel_is_chosen():
    table = choose(SHAPE, [times(1024, 10, plan=7), times(1, 10, few=5, plan=9)])
    assert table.text == f"1={FEW} 1024=cusparselt:7"
    assert [row.speedup for row in table.rows] == [2, 10 / 7]
    assert table.decision((1, 1024)) is None


def test_the_dense_weight_is_used_only_if_it_is_kept():
    measured = [times(1, 10, few=5), times(256, 10, plan=12)]
    without, kept = (choose(SHAPE, measured, keep_dense=keep) for keep in (False, True))
    assert str(without.rows[1].kernel) == "cusparselt:7"
    assert kept.rows[1].kernel == DENSE
    assert kept.rows[1].speedup == 1
    assert without.decision((1, 256)) == (
        "slower (0.83 x at 256 tokens; keep_dense=True would use cuBLAS there): stays dense"
    )
    assert without.decision((1,)) is None, "slower only at a number of tokens that does not matter"
    assert kept.decision((1, 256)) is None
    assert "no packed kernel is faster" in kept.decision((256,))


def test_neighbours_with_one_kernel_share_an_entry():
    table = choose(SHAPE, [times(1, 10, few=5), times(8, 10, few=5), times(64, 10, plan=5), times(128, 9, plan=5)])
    assert table.text == f"8={FEW} 128=cusparselt:7"


def test_nothing_measured_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match=r"no packed kernel runs for \(4096, 1024\) at 64 tokens: out of luck"):
        choose(SHAPE, [KernelTimes(64, 10.0, {}, ("out of luck",))])
    assert choose(SHAPE, [KernelTimes(64, 10.0, {}, ("out of luck",))], keep_dense=True).rows[0].kernel == DENSE


def test_by_rule_own_kernels_take_few_tokens_and_the_library_many():
    def ways(capability):
        table = table_by_rule(SHAPE, capability)
        return [kernel_for(table.text, tokens).name for tokens in (1, 8, 32, 200, 100_000)]

    assert ways((9, 0)) == [*["warpgroup"] * 4, "cusparselt"]
    assert ways((8, 0)) == ["few", "few", "few", "cusparselt", "cusparselt"]
    without_compiler = table_by_rule(SHAPE, (9, 0), "torch", own=False)
    assert [row.kernel.name for row in without_compiler.rows] == ["torch"]
    old = table_by_rule(SHAPE, (7, 5), "expand")
    assert old.text == f"{BUCKETS[-1]}=expand"


def test_rules_fill_what_was_not_measured():
    measured = (TableRow(64, DENSE, 1.0, 1.0),)
    table = KernelTable(SHAPE, completed(measured, table_by_rule(SHAPE, (9, 0)).rows))
    assert [row.tokens for row in table.rows] == sorted({row.tokens for row in table.rows})
    assert kernel_for(table.text, 64) == DENSE
    assert kernel_for(table.text, 1).name == "warpgroup"


def test_by_rule_in_8_bits():
    def ways(capability, form, many_tokens="cusparselt"):
        table = table_by_rule(SHAPE, capability, many_tokens, form=form)
        assert [row.tokens for row in table.rows] == sorted({row.tokens for row in table.rows})
        assert table.form == form
        return [kernel_for(table.text, tokens).name for tokens in (1, 64, 256, 1024, 100_000)]

    assert ways((9, 0), "fp8_e4m3") == [*["warpgroup"] * 3, "many", "many"]
    assert ways((8, 0), "int8") == ["few", "few", *["cusparselt"] * 3]
    assert ways((8, 9), "fp8_e4m3", "expand") == ["few", "few", *["expand"] * 3]
    assert ways((8, 6), "fp8_e4m3", "expand") == ["expand"] * 5, "no float8 on this GPU: exact, without rounded tokens"


def test_ways_of_dense_float8_are_those_measured_or_go_by_rule():
    times = [KernelTimes(tokens, 20.0, {FEW: 12.0}, (), 11.0, way) for tokens, way in ((1, ""), (64, "dense_fp8:0"))]
    assert choose(SHAPE, times).dense_fp8_text == "1=dense_fp8:1 64=dense_fp8:0"
    by_rule = table_by_rule(SHAPE, (9, 0), form="fp8_e4m3").dense_fp8_text
    assert by_rule == "256=dense_fp8:1 16384=dense_fp8:0"


def test_rows_hold_the_time_in_dense_float8():
    entry = KernelTimes(64, 20.0, {FEW: 12.0}, (), 11.0)
    table = choose(SHAPE, [entry], form="fp8_e4m3")
    assert table.rows[0].speedup == 20 / 12
    assert table.rows[0].speedup_over_fp8 == 11 / 12
    assert choose(SHAPE, [KernelTimes(64, 20.0, {FEW: 12.0})], form="int8").rows[0].speedup_over_fp8 is None
    kept = choose(SHAPE, [replace(entry, dense_us=9.0)], keep_dense=True, form="int8")
    assert (kept.rows[0].kernel, kept.rows[0].dense_fp8_us) == (DENSE, 11.0)
