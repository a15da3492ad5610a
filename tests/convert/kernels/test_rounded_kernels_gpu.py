"""Kernels for weights of 8 bits on a CUDA GPU: ``pytest -m gpu tests/convert/kernels/test_rounded_kernels_gpu.py``.

Each is compared with the product, in double precision, of the same rounded tokens and weight.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prox24_lightning.convert import convert_linear
from prox24_lightning.convert.autotune.tune import kernel_tables
from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, unpack_24
from prox24_lightning.convert.kernels import reference, rounded_buffer
from prox24_lightning.convert.kernels.cusparselt.bindings import support
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS as FEW_TOKENS_TILINGS
from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.many_tokens.tiling import CAPABILITY
from prox24_lightning.convert.kernels.many_tokens.tiling import TILINGS as MANY_TOKENS_TILINGS
from prox24_lightning.convert.kernels.registry import (
    Kernel,
    compile_kernel,
    dense_fp8_kernels,
    own_kernels,
    prepare,
)
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.round_tokens import reference as round_tokens_reference
from prox24_lightning.convert.kernels.warpgroup.tiling import ROUNDED_TILINGS
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.weights.rounding import round_rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

FORMS = ["fp8_e4m3", "int8"]
DTYPES = [torch.float16, torch.bfloat16]
LARGEST = 5e-3  # relative error of a product of rounded operands, in 16 bits: half of it is bfloat16's own
SHAPES = [(64, 64), (320, 2176), (1000, 4096), (250, 1001)]
BESIDE = [tiling for tiling in MANY_TOKENS_TILINGS if tiling.beside]


@pytest.fixture(autouse=True)
def _gpu(tmp_path_factory, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setenv("PROX24_KERNEL_CACHE", str(tmp_path_factory.getbasetemp() / "kernels.json"))
    torch.manual_seed(0)


def skip_without(form: str) -> None:
    if form == "fp8_e4m3" and not dense_fp8_kernels(torch.cuda.get_device_capability()):
        pytest.skip("this GPU has no float8")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def poison() -> None:
    """The memory that the next result will take holds NaN: what a kernel leaves unwritten shows."""
    torch.full((4, 1024, 1024), torch.nan, device="cuda")


def pruned(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    weight = torch.randn(shape[0], -(-shape[1] // 4) * 4, device="cuda")
    return (weight * mask_24(weight))[:, : shape[1]].to(dtype)


def compile_all(kernels: Sequence[Kernel], form: str, *dtypes: torch.dtype) -> None:
    """Compile in parallel, since one after the other takes minutes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda each: compile_kernel(*each, (9, 0), form), itertools.product(kernels, dtypes)))


class Case:
    """A weight in a form, packed, and the product of rounded operands."""

    def __init__(self, shape: tuple[int, int], form: str) -> None:
        self.shape, self.form = shape, form
        self.buffer = rounded_buffer.pack_buffer(pruned(shape), form)
        self.dense = reference.expand(self.buffer, shape, torch.float32, form).double()
        self.bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)

    def error(self, kernel: Kernel, tokens: int, dtype: torch.dtype = torch.bfloat16) -> float:
        inputs = torch.randn(tokens, self.shape[1], device="cuda", dtype=dtype)
        rounded = round_tokens_reference.round_tokens(inputs, self.form)
        operand = inputs.double() if kernel.name == "expand" else rounded.values.double() * rounded.scales.unsqueeze(-1)
        product = prepare(kernel, dtype, self.shape, tokens, 0, self.form)
        poison()
        found = product(inputs, self.buffer, None, self.bias)
        assert found.shape == (tokens, self.shape[0])
        assert found.is_contiguous()
        return relative(found, operand @ self.dense.t() + self.bias.double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 128), (128, 256), (192, 384)])
def test_the_buffer_is_cusparselts_own(form, shape):
    skip_without(form)
    assert support(0, form) == ("cusparselt", "")
    buffer = rounded_buffer.random_buffer(shape, form, torch.device("cuda"), 1)
    packed = rounded_buffer.from_buffer(buffer, shape, form, torch.bfloat16)
    theirs = torch._cslt_compress(unpack_24(PackedWeight(packed.values, packed.indices, shape)))
    places = rounded_buffer.places(shape)
    assert torch.equal(theirs.view(torch.int8).flatten()[: places.row_scales], buffer[: places.row_scales])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 4096), (5, 1000), (3, 1001), (70, 14336), (2, 33000), (1025, 4096), (1030, 1001)]
)
def test_tokens_are_rounded_bit_for_bit(form, dtype, tokens, columns):
    skip_without(form)
    inputs = torch.randn(tokens, columns, device="cuda", dtype=dtype) * 3
    inputs[-1] = 0
    inputs[0, 0] = 1e-7
    width = rounded_buffer.padded_shape((1, columns))[1]
    run = round_tokens.prepare(form, dtype, columns, width, tokens, 0)
    for scale in (0.0, 0.037):
        given = torch.full((4,), scale, device="cuda")
        expected = round_tokens_reference.round_tokens(inputs, form, float(given[0]) or None)
        poison()
        rounded = run(inputs, given.data_ptr())
        values = round_tokens.values_view(rounded, form, tokens, width).view(torch.int8)
        assert torch.equal(values[:, :columns], expected.values.view(torch.int8))
        assert not values[:, columns:].any()
        assert torch.equal(rounded[tokens * width :].view(torch.float32), expected.scales)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_with_nan_or_inf_have_products_of_nan(form):
    skip_without(form)
    case = Case((320, 2176), form)
    for tokens in (8, 300):
        inputs = torch.randn(tokens, 2176, device="cuda", dtype=torch.bfloat16)
        inputs[1, 7], inputs[5, 0] = torch.nan, torch.inf
        for scale in (None, 0.02):
            packed = rounded_buffer.from_buffer(case.buffer, case.shape, form, torch.bfloat16)
            buffer = rounded_buffer.to_buffer(replace(packed, input_scale=scale))
            for kernel in own_kernels(tokens, torch.cuda.get_device_capability(), form)[-1:]:
                found = prepare(kernel, torch.bfloat16, case.shape, tokens, 0, form)(inputs, buffer, None, None)
                finite = found.isfinite()
                assert torch.nonzero(~finite.all(-1)).flatten().tolist() == [1, 5]
                assert not finite[[1, 5]].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_expansion_is_exact(form, dtype, shape):
    weight = pruned(shape, dtype)
    packed = pack_24(weight, form=form)
    assert torch.equal(expand(rounded_buffer.to_buffer(packed), shape, dtype, form), unpack_24(packed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_warpgroup_tiling_multiplies(form, shape):
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    case = Case(shape, form)
    compile_all([Kernel.warpgroup(tiling) for tiling in ROUNDED_TILINGS], form, torch.bfloat16)
    for tiling in ROUNDED_TILINGS:
        for tokens in {1, tiling.tokens - 1, tiling.tokens + 3}:
            assert case.error(Kernel.warpgroup(tiling), tokens) < LARGEST, (tiling, tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 128), (320, 2176), (1024, 4096), (200, 14336), (128, 16384), (64, 20480)])
def test_a_token_rounded_by_the_blocks_has_the_same_product(form, shape):
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    buffer = rounded_buffer.random_buffer(shape, form, torch.device("cuda"), 1)
    tilings = [tiling for tiling in ROUNDED_TILINGS if tiling.within]
    compile_all([Kernel.warpgroup(tiling) for tiling in tilings], form, torch.bfloat16)
    for poisoned in (False, True):
        inputs = torch.randn(1, shape[1], device="cuda", dtype=torch.bfloat16)
        if poisoned:
            inputs[0, -1] = torch.nan
        for tiling in tilings:
            before = replace(tiling, within=0, stages=2)
            expected, found = (
                prepare(Kernel.warpgroup(each), torch.bfloat16, shape, 1, 0, form)(inputs, buffer, None, None)
                for each in (before, tiling)
            )
            assert torch.equal(found, expected) or poisoned, tiling
            assert found.isnan().all() == poisoned


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4096, 512), (3000, 4096), (8192, 14336)])
def test_tokens_rounded_beside_the_product_have_the_same_products(form, shape):
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    buffer = rounded_buffer.random_buffer(shape, form, torch.device("cuda"), 1)
    compile_all([Kernel.many(tiling) for tiling in BESIDE], form, torch.bfloat16)
    for tokens in (513, 2000, 6001):
        inputs = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        inputs[-1, 3], inputs[tokens // 2] = torch.nan, 0
        for tiling in BESIDE:
            before = Kernel.many(replace(tiling, beside=0))
            expected = prepare(before, torch.bfloat16, shape, tokens, 0, form)(inputs, buffer, None, None)
            poison()
            product = prepare(Kernel.many(tiling), torch.bfloat16, shape, tokens, 0, form)
            for _ in range(3):
                found = product(inputs, buffer, None, None)
                assert torch.equal(found[:-1], expected[:-1]), (tiling, tokens)
                assert found[-1].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_two_products_at_once_round_their_tokens_beside_them(form):
    """Neither waits for a block of its own that cannot start before the other has ended."""
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    shape, tokens = (4096, 1024), 8192
    buffer = rounded_buffer.random_buffer(shape, form, torch.device("cuda"), 1)
    inputs = torch.randn(2, tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    product = prepare(Kernel.many(BESIDE[0]), torch.bfloat16, shape, tokens, 0, form)
    expected = [product(each, buffer, None, None) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(product(each, buffer, None, None))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024)])
def test_every_tiling_for_many_tokens_multiplies(form, shape):
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    case = Case(shape, form)
    compile_all([Kernel.many(tiling) for tiling in MANY_TOKENS_TILINGS], form, *DTYPES)
    for tiling in MANY_TOKENS_TILINGS:
        for tokens, dtype in ((1, torch.bfloat16), (256, torch.float16), (777, torch.bfloat16), (4096, torch.float16)):
            assert case.error(Kernel.many(tiling), tokens, dtype) < LARGEST, (tiling, tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tiling_for_few_tokens_multiplies(form, shape):
    capability = torch.cuda.get_device_capability()
    if not few_tokens_tilings(1, capability, form):
        pytest.skip("not for this GPU")
    case = Case(shape, form)
    for tiling in FEW_TOKENS_TILINGS:
        if tiling in few_tokens_tilings(tiling.tokens, capability, form):
            for tokens in {1, tiling.tokens - 1, tiling.tokens + 3}:
                assert case.error(Kernel.few(tiling), tokens) < LARGEST, (tiling, tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_libraries_multiply(form, shape, dtype):
    skip_without(form)
    case = Case(shape, form)
    for tokens in (1, 7, 300, 1024):
        for kernel in (Kernel("cusparselt"), Kernel("cusparselt", (0,)), Kernel("expand")):
            assert case.error(kernel, tokens, dtype) < LARGEST, (kernel, tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_float8_multiplies(shape, dtype):
    skip_without("fp8_e4m3")
    weight = round_rows(torch.randn(shape, device="cuda"), "fp8_e4m3")
    buffer = rounded_buffer.to_dense_buffer(weight)
    dense = weight.values.double() * weight.scales.double().unsqueeze(-1)
    bias = torch.randn(shape[0], device="cuda")
    for kernel in dense_fp8_kernels(torch.cuda.get_device_capability()):
        for tokens in (1, 7, 300):
            inputs = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            rounded = round_tokens_reference.round_tokens(inputs, "fp8_e4m3")
            found = prepare(kernel, dtype, shape, tokens, 0, "fp8_e4m3")(inputs, buffer, None, bias)
            expected = rounded.values.double() * rounded.scales.unsqueeze(-1) @ dense.t() + bias.double()
            assert relative(found, expected) < 2 * LARGEST, (kernel, tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 300, 5000])
def test_kernels_that_start_early_wait_for_their_inputs(form, tokens):
    """A chain: kernels start while the ones before them run, and must not read what is not written yet."""
    shape = (2048, 2048)
    buffers = [rounded_buffer.pack_buffer(pruned(shape) / 32, form) for _ in range(8)]
    inputs = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    kernels = own_kernels(tokens, torch.cuda.get_device_capability(), form)[::2]
    compile_all(kernels, form, torch.bfloat16)
    for kernel in kernels:
        run = prepare(kernel, torch.bfloat16, shape, tokens, 0, form)
        expected = inputs
        for buffer in buffers:
            torch.cuda.synchronize()
            expected = run(expected.clone(), buffer, None, None)
        last = torch.empty_like(inputs)

        def chain(run=run, last=last) -> None:
            out = inputs
            for buffer in buffers:
                out = run(out, buffer, None, None)
            last.copy_(out)

        for call in (*[chain] * 10, *[capture(chain).replay] * 40):
            last.fill_(torch.nan)
            call()
            assert torch.equal(last, expected), kernel


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 24, 200, 2048])
def test_cuda_graphs_and_compile(form, tokens):
    skip_without(form)

    def layer(inputs: int, outputs: int, bias: bool) -> nn.Module:
        linear = nn.Linear(inputs, outputs, bias=bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.mul_(mask_24(linear.weight))
        return convert_linear(linear, weights=form)

    model = nn.Sequential(layer(1024, 2048, True), nn.GELU(), layer(2048, 1008, False))
    rows = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        outputs = {}

        def call() -> None:
            outputs["graph"] = model(rows)

        graph = capture(call)
        rows.copy_(torch.randn_like(rows))
        expected = model(rows)
        graph.replay()
        assert torch.equal(outputs["graph"], expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            assert relative(compiled(rows), expected) < 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_measured_among_the_dense_forms(form):
    skip_without(form)
    shape = (1024, 2048)
    table = kernel_tables([shape], torch.bfloat16, token_counts=(1, 1024), form=form)[shape]
    assert [row.tokens for row in table.rows] == [1, 1024]
    assert all(row.us and row.dense_us for row in table.rows)
    assert all(
        (row.dense_fp8_us is not None) == bool(dense_fp8_kernels(torch.cuda.get_device_capability()))
        for row in table.rows
    )
    assert not any("wrong products" in note for row in table.rows for note in row.notes)
    assert replace(table, form=None).text == table.text
