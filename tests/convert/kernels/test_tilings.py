"""How the CUDA kernels cut up their work. No GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.few_tokens import kernel as few_tokens
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS, Tiling
from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.many_tokens import kernel as many_tokens
from prox24_lightning.convert.kernels.many_tokens.tiling import TILINGS as MANY_TOKENS_TILINGS
from prox24_lightning.convert.kernels.many_tokens.tiling import Tiling as ManyTokensTiling
from prox24_lightning.convert.kernels.many_tokens.tiling import tilings as many_tokens_tilings
from prox24_lightning.convert.kernels.warpgroup import kernel as warpgroup
from prox24_lightning.convert.kernels.warpgroup.kernel import wgmma_instruction
from prox24_lightning.convert.kernels.warpgroup.tiling import ROUNDED_TILINGS
from prox24_lightning.convert.kernels.warpgroup.tiling import TILINGS as WARPGROUP_TILINGS
from prox24_lightning.convert.kernels.warpgroup.tiling import Tiling as WarpgroupTiling
from prox24_lightning.convert.kernels.warpgroup.tiling import tilings as warpgroup_tilings


def test_few_tokens_tilings_fit_the_tokens_and_the_gpu():
    for tokens in (1, 8, 9, 16, 32, 64):
        found = few_tokens_tilings(tokens, (9, 0))
        assert found
        assert len({tiling.tokens for tiling in found}) == 1
        assert found[0].tokens >= tokens
    assert all(tiling.cluster == 1 for tiling in few_tokens_tilings(1, (8, 0)))
    assert few_tokens_tilings(1, (7, 5)) == ()
    for tiling in TILINGS:
        assert tiling.shared_bytes <= 227 * 1024
        assert tiling.threads <= 1024
        assert tiling.resident * tiling.threads <= 2048
        assert tiling.depth % tiling.span == 0


def test_macros_of_a_few_tokens_tiling():
    tiling = Tiling(1, 2, 8, 4, 2, 1, 2, 4, 1)
    names = ["STAGED", "MT", "NT", "WR", "WK", "CS", "SPAN", "DEPTH", "RESIDENT"]
    assert tiling.macros == dict(zip(names, (1, 2, 8, 4, 2, 1, 2, 4, 1), strict=True))
    assert all(f"{name}" in few_tokens.SOURCE.read_text() for name in names)
    assert (tiling.tokens, tiling.rows, tiling.threads) == (64, 128, 256)


def test_warpgroup_tilings_fit_the_gpu():
    for tokens in (1, 16, 17, 64, 100, 256, 512):
        found = warpgroup_tilings(tokens, (9, 0))
        assert found
        assert max(tiling.tokens for tiling in found) >= min(tokens, 256)
        assert {tiling.tokens for tiling in found} <= {8, 16, 32, 64, 128, 256}
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert warpgroup_tilings(64, capability) == (), "the instructions are Hopper's alone"
    assert warpgroup_tilings(4096, (9, 0)) == ()
    assert all(tiling.tokens == 8 or tiling.across > 1 for tiling in warpgroup_tilings(5, (9, 0)))
    assert any(tiling.across > 1 for tiling in warpgroup_tilings(5, (9, 0))), "to share takes sixteen tokens"
    for tiling in WARPGROUP_TILINGS:
        assert tiling.shared_bytes() <= 227 * 1024
        assert tiling.threads <= 1024
        assert tiling.stages >= 2
        assert tiling.across * tiling.cluster <= 8, "the largest cluster that every GPU of the kind takes"
        assert tiling.tokens // tiling.across % 8 == 0, "the copy engine swizzles eight rows at a time"
        assert tiling.stage_bytes() % 1024 == 0


def test_macros_and_instruction_of_a_warpgroup_tiling():
    tiling = WarpgroupTiling(64, 2, 2, 4, 3)
    assert tiling.macros == {"TOKENS": 64, "GROUPS": 2, "CR": 2, "CS": 4, "STAGES": 3, "ONE": 0}
    assert all(name in warpgroup.SOURCE.read_text() for name in tiling.macros)
    assert (tiling.rows, tiling.threads, tiling.stage_bytes()) == (128, 288, 128 * 128 + 64 * 256 + 2048)
    text = wgmma_instruction(64, torch.bfloat16)
    assert "m64n64k32.f32.bf16.bf16" in text
    assert "Sum (&d)[32]" in text
    assert text.count("+f") == 32


def test_instructions_of_8_bits():
    fp8, int8 = (wgmma_instruction(16, torch.bfloat16, form) for form in ("fp8_e4m3", "int8"))
    assert "m64n16k64.f32.e4m3.e4m3" in fp8
    assert "p, 1, 1; }" in fp8
    assert "m64n16k64.s32.s8.s8" in int8
    assert "p; }" in int8
    assert int8.count("+r") == 8


def test_rounded_tilings_hold_twice_the_metadata():
    for tiling in ROUNDED_TILINGS:
        assert tiling.stage_bytes(rounded=True) == tiling.stage_bytes() + 16 * tiling.rows
        assert tiling.stage_bytes(rounded=True) % 1024 == 0
        assert tiling.shared_bytes(rounded=True) <= 227 * 1024
        assert tiling.stages >= 2
        assert tiling.across * tiling.cluster <= 8
        assert tiling.tokens // tiling.across % 8 == 0
    for tokens in (1, 16, 100, 512):
        assert warpgroup_tilings(tokens, (9, 0), rounded=True)
    assert warpgroup_tilings(1, (8, 9), rounded=True) == ()
    shape = (8192, 8192)
    one = ROUNDED_TILINGS[0]
    assert one.cost(shape, 1, rounded=True) < replace(one, within=0).cost(shape, 1)


def test_blocks_that_round_a_token_have_room_for_it():
    within = [tiling for tiling in ROUNDED_TILINGS if tiling.within]
    assert set(within) & set(warpgroup_tilings(1, (9, 0), rounded=True)) == set(within)
    assert not set(within) & set(warpgroup_tilings(2, (9, 0), rounded=True)), "they round one token"
    for tiling in within:
        assert (tiling.tokens, tiling.across) == (8, 1)
        for columns in (128, 4096, 14336, 16384):
            if tiling.for_token((64, columns), 1) is tiling:
                pieces = -(-columns // 256)
                needed = tiling.stages * 160 * tiling.rows + 1024 + -(-pieces // tiling.cluster) * 2048
                assert needed == tiling.shared_bytes(rounded=True) + tiling.token_bytes(columns // 2)
                assert needed <= 227 * 1024
    tiling = within[0]
    assert tiling.for_token((64, 4096), 1) is tiling
    for shape, tokens in (((64, 4096), 2), ((64, 4097), 1), ((64, 16512), 1)):
        instead = tiling.for_token(shape, tokens)
        assert not instead.within
        assert instead.shared_bytes(rounded=True) <= 227 * 1024


def test_tokens_rounded_before_the_product_are_those_of_its_first_tiles():
    tiling = ManyTokensTiling(256, 2, 2, 4, 1)
    assert tiling.first_tokens(row_tiles=56, clusters=66) == 1024, "a panel"
    assert tiling.first_tokens(row_tiles=4, clusters=66) == 16 * 256, "as many as the clusters take at once"
    assert tiling.threads == replace(tiling, beside=0).threads + 96
    assert tiling.shared_bytes == replace(tiling, beside=0).shared_bytes
    assert tiling.threads * 168 <= 65536, "registers of a multiprocessor: the products need as many a thread"


def test_many_tokens_tilings_fit_the_gpu():
    assert many_tokens_tilings(128, (9, 0)) == ()
    assert many_tokens_tilings(16384, (9, 0)) == MANY_TOKENS_TILINGS
    assert many_tokens_tilings(16384, (10, 0)) == many_tokens_tilings(16384, (8, 9)) == ()
    for tiling in MANY_TOKENS_TILINGS:
        assert tiling.shared_bytes <= 227 * 1024
        assert tiling.stages >= 4
        assert tiling.tokens % 64 == 0, "chunks of 64 tokens"
        assert tiling.tokens // tiling.across % 8 == 0, "the copy engine swizzles eight rows at a time"
        assert tiling.stage_bytes % 1024 == 0
        assert all(name in many_tokens.SOURCE.read_text() for name in tiling.macros)
    two, _, one, small = MANY_TOKENS_TILINGS[3:]
    assert two.cost((8192, 8192), 16384) < one.cost((8192, 8192), 16384), "shared inputs are read once"
    assert small.cost((4096, 4096), 256) < two.cost((4096, 4096), 256), "half of the GPU would have no tile"


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("form", ["fp8_e4m3", "int8"])
def test_every_tiling_of_8_bits_compiles(form):
    for tiling in (*ROUNDED_TILINGS[:1], *ROUNDED_TILINGS[-1:]):
        assert warpgroup.compile_warpgroup(tiling, torch.bfloat16, form)
    for tiling in MANY_TOKENS_TILINGS:
        assert many_tokens.compile_many_tokens(tiling, torch.float16, form)
    capability = (8, 9) if form == "fp8_e4m3" else (8, 0)
    for tiling in few_tokens_tilings(8, capability, form):
        assert few_tokens.compile_few_tokens(tiling, torch.bfloat16, capability, form)


def test_float8_in_few_tokens_needs_instructions_of_its_own():
    assert few_tokens_tilings(8, (8, 9), "fp8_e4m3")
    assert few_tokens_tilings(8, (8, 6), "fp8_e4m3") == ()
    assert few_tokens_tilings(8, (9, 0), "fp8_e4m3") == ()
    assert few_tokens_tilings(8, (8, 0), "int8") == few_tokens_tilings(8, (8, 0))
