"""The kernels of converted layers on a CUDA GPU: ``pytest -m gpu tests/convert/kernels/test_kernels_gpu.py``."""

from __future__ import annotations

import time

import pytest
import torch
from torch import library, nn

from prox24_lightning.convert import convert_linear, convert_model
from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.kernel_table import DENSE, SAME
from prox24_lightning.convert.autotune.tune import kernel_tables, stored_table
from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.convert.kernels import reference
from prox24_lightning.convert.kernels.cusparselt import bindings as cusparselt
from prox24_lightning.convert.kernels.cusparselt.bindings import support
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS as FEW_TOKENS_TILINGS
from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.packed_buffer import from_buffer, padded_shape, random_buffer, to_buffer
from prox24_lightning.convert.kernels.registry import Kernel, own_kernels, prepare
from prox24_lightning.convert.kernels.warpgroup.tiling import CAPABILITY
from prox24_lightning.convert.kernels.warpgroup.tiling import TILINGS as WARPGROUP_TILINGS
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.devices.cuda_graphs import capture

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = [torch.float16, torch.bfloat16]
LARGEST = 1e-2  # relative error of a 16-bit product


@pytest.fixture(autouse=True)
def _gpu(tmp_path_factory, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setenv("PROX24_KERNEL_CACHE", str(tmp_path_factory.getbasetemp() / "kernels.json"))
    torch.manual_seed(0)


def pruned(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)
    layer.weight.mul_(mask_24(layer.weight))
    return layer


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def poison() -> None:
    """The memory that the next result will take holds NaN: what a kernel leaves unwritten shows."""
    torch.full((4, 1024, 1024), torch.nan, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 256), (64, 64), (1024, 512)])
def test_the_buffer_is_cusparselts_own(dtype, shape):
    weight = pruned(shape[1], shape[0], dtype).weight
    theirs = torch._cslt_compress(weight)
    assert torch.equal(to_buffer(pack_24(weight)).flatten(), theirs.view(torch.int16).flatten())
    assert support(0) == ("cusparselt", "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (100, 72), (1040, 2064)])
def test_expansion_is_exact(dtype, shape):
    weight = pruned(shape[1], shape[0], dtype).weight
    buffer = to_buffer(pack_24(weight))
    assert torch.equal(expand(buffer, shape, dtype), weight)
    assert torch.equal(unpack_24(from_buffer(buffer, shape, dtype)), weight)


@pytest.mark.parametrize("tiling", FEW_TOKENS_TILINGS, ids=str)
def test_every_tiling_multiplies(tiling):
    if tiling not in few_tokens_tilings(tiling.tokens, torch.cuda.get_device_capability()):
        pytest.skip("not for this GPU")
    for dtype, shape in ((torch.bfloat16, (320, 1088)), (torch.float16, (64, 64)), (torch.bfloat16, (1024, 4096))):
        buffer = random_buffer(shape, dtype, torch.device("cuda"), 0)
        dense = reference.expand(buffer, shape, dtype).float()
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        for tokens in {1, tiling.tokens - 1, tiling.tokens, tiling.tokens + 3}:
            rows = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            product = prepare(Kernel.few(tiling), dtype, shape, tokens, 0)
            poison()
            out = product(rows, buffer, None, bias)
            assert relative(out, rows.float() @ dense.t() + bias.float()) < LARGEST, (dtype, shape, tokens)


@pytest.mark.parametrize("tiling", WARPGROUP_TILINGS, ids=str)
def test_every_warpgroup_tiling_multiplies(tiling):
    if torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("not for this GPU")
    kernel = Kernel.warpgroup(tiling)
    for dtype, shape in ((torch.bfloat16, (320, 1088)), (torch.float16, (64, 64)), (torch.bfloat16, (1000, 4096))):
        columns = padded_shape(shape)[1]
        buffers = [random_buffer(shape, dtype, torch.device("cuda"), seed) for seed in range(2)]
        dense = [reference.expand(buffer, shape, dtype).double() for buffer in buffers]
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        for tokens in {1, tiling.tokens - 1, tiling.tokens, tiling.tokens + 3}:
            inputs = torch.randn(tokens, columns, device="cuda", dtype=dtype)
            run = prepare(kernel, dtype, shape, tokens, 0)
            poison()
            found = [run(inputs, buffer, None, bias) for buffer in (*buffers, *buffers)]
            assert torch.equal(found[0], found[2]), "a fixed order of sums"
            for out, weight in zip(found, dense, strict=False):
                assert relative(out, inputs.double() @ weight.t() + bias.double()) < LARGEST, (dtype, shape, tokens)


@pytest.mark.parametrize("kernel", ["few", "warpgroup"])
def test_kernels_that_start_early_wait_for_their_inputs(kernel):
    """A chain: each kernel starts while the one before it runs, and must not read what is not written yet."""
    found = [each for each in own_kernels(16, torch.cuda.get_device_capability()) if each.name == kernel]
    if not found:
        pytest.skip("not for this GPU")
    shape = (2048, 2048)
    buffers = [random_buffer(shape, torch.bfloat16, torch.device("cuda"), seed) for seed in range(8)]
    rows = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    run = prepare(found[0], torch.bfloat16, shape, 16, 0)
    expected = rows
    for buffer in buffers:
        expected = expected @ reference.expand(buffer, shape, torch.bfloat16).t()
    last = torch.empty_like(rows)

    def chain() -> None:
        out = rows
        for buffer in buffers:
            out = run(out, buffer, None, None)
        last.copy_(out)

    for call in (chain, chain, (replay := capture(chain).replay), replay):
        last.fill_(torch.nan)
        call()
        assert relative(last, expected) < 5 * LARGEST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (112, 80), (512, 1024), (4096, 4160)])
@pytest.mark.parametrize("bias", [None, "same", "float32"])
def test_every_kernel_gives_the_dense_product(dtype, shape, bias):
    layer = pruned(shape[1], shape[0], dtype, bias=bias is not None)
    converted = convert_linear(layer, keep_dense=True)
    if bias == "float32":
        converted.bias.data = converted.bias.data.float()
    rule = converted.kernels
    ours = [f"1={kernel}" for kernel in own_kernels(200, torch.cuda.get_device_capability())[-1:]]
    for kernels in (rule, *ours, *(f"1={name}" for name in ("dense", "cusparselt", "cusparselt:0", "torch", "expand"))):
        converted.kernels = kernels
        for tokens in ((1,), (7,), (3, 11), (64,), (200,), (0,), (2, 0)):
            rows = torch.randn(*tokens, shape[1], device="cuda", dtype=dtype)
            expected = layer(rows)
            poison()
            found = converted(rows)
            assert found.shape == expected.shape
            assert found.is_contiguous()
            if found.numel():
                assert relative(found, expected) < LARGEST, (kernels, tokens)
                flat = rows.reshape(-1, shape[1])
                plain = reference.linear(flat, converted.packed, converted.bias, dtype, shape)
                assert relative(found.reshape(plain.shape), plain) < LARGEST, (kernels, tokens)


def test_a_token_gives_the_same_alone_and_among_others():
    converted = convert_linear(pruned(4096, 1024, torch.bfloat16))
    rows = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(converted(rows), converted(rows)), "no race, and a fixed order of sums"
    assert torch.equal(converted(rows)[:5], converted(rows[:5]))


def test_strides_offsets_autocast_and_inference_mode():
    layer = pruned(256, 128, torch.bfloat16, bias=True)
    converted = convert_linear(layer)
    wide = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    odd = torch.randn(256 * 9 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(9, 256)
    for rows in (wide.t().contiguous().t(), wide[::3], wide[5:9], odd, wide.view(3, 100, 256).transpose(0, 1)):
        assert relative(converted(rows), layer(rows)) < LARGEST
    with torch.inference_mode():
        assert relative(converted(wide), layer(wide)) < LARGEST
    with torch.autocast("cuda", torch.bfloat16):
        assert relative(converted(wide.float()), layer(wide)) < LARGEST
    with pytest.raises(RuntimeError, match="cast the input"):
        converted(wide.float())
    with pytest.raises(RuntimeError, match="does not end in in_features=256"):
        converted(wide[:, :128])
    with pytest.raises(RuntimeError, match="has no backward"):
        converted(wide.clone().requires_grad_())


@pytest.mark.parametrize("tokens", [1, 24, 200, 2048])
def test_cuda_graphs_and_compile(tokens):
    layer = pruned(1024, 2048, torch.bfloat16, bias=True)
    model = nn.Sequential(convert_linear(layer), nn.GELU(), convert_linear(pruned(2048, 1024, torch.bfloat16)))
    rows = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(rows)
        outputs = {}

        def call() -> None:
            outputs["graph"] = model(rows)

        graph = capture(call)
        rows.copy_(torch.randn_like(rows))
        expected = model(rows)
        graph.replay()
        assert torch.equal(outputs["graph"], expected)
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, mode=mode)
            for _ in range(3):
                assert relative(compiled(rows).clone(), expected) < LARGEST
        assert library.opcheck(
            torch.ops.prox24.packed_linear.default,
            (rows, model[0].packed, None, None, torch.bfloat16, 2048, 1024, model[0].kernels),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_host_time_of_a_call():
    layer = pruned(1024, 1024, torch.bfloat16)
    rows = {tokens: torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16) for tokens in (1, 64, 512)}
    converted = convert_linear(layer)

    def microseconds(module: nn.Module, given: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                module(given)
            best = min(best, (time.perf_counter() - start) * 1e4)
            torch.cuda.synchronize()
        return best

    with torch.no_grad():
        for tokens, given in rows.items():
            ours, dense = microseconds(converted, given), microseconds(layer, given)
            print(f"host time at {tokens} tokens: {ours:.1f} us, dense {dense:.1f} us")
            assert ours < dense + 30


def test_measured_tables_are_kept_and_used(tmp_path):
    shape = (1024, 2048)
    counts = (1, 64, 1024)
    start = time.perf_counter()
    table = kernel_tables([shape], torch.bfloat16, token_counts=counts, device=torch.device("cuda"))[shape]
    measured = time.perf_counter() - start
    assert [row.tokens for row in table.rows] == list(counts)
    assert table.rows[0].kernel.name in ("few", "warpgroup")
    assert table.rows[2].kernel.name in ("cusparselt", "expand")
    known = disk_cache.find(disk_cache.default_path(), disk_cache.Machine.here(0), torch.bfloat16, shape, counts)
    assert any(name.startswith("cusparselt") for name in known[1024].kernels), "it was measured, whichever won"
    start = time.perf_counter()
    assert kernel_tables([shape], torch.bfloat16, token_counts=counts) == {shape: table}
    assert time.perf_counter() - start < 0.1 * measured, "read, not measured again"
    stored = stored_table(shape, torch.bfloat16, device=0)
    assert set(table.rows) <= set(stored.rows)
    with_dense = kernel_tables([shape], torch.bfloat16, token_counts=counts, keep_dense=True)[shape]
    assert all(row.kernel == DENSE or row.us < SAME * row.dense_us for row in with_dense.rows)
    print(f"measured in {measured:.1f} s:", table.text)


def test_a_model_where_nothing_wins_stays_dense():
    model = nn.Sequential(pruned(64, 64, torch.bfloat16), nn.ReLU())
    with torch.no_grad():
        done = convert_model(model, token_counts=(512,))
    if done.converted:
        pytest.skip(f"it does win here: {done.tables}")
    assert "slower" in done.dense[0].why
    assert isinstance(model[0], nn.Linear)


def test_weights_take_less_than_six_tenths():
    converted = convert_linear(pruned(4096, 4096, torch.bfloat16))
    assert converted.stored_bytes == converted.packed.nbytes <= 0.6 * 4096 * 4096 * 2
    assert padded_shape((4096, 4096)) == (4096, 4096)


def test_without_the_binding_torchs_operator_is_named(monkeypatch):
    def refuse() -> None:
        raise cusparselt.CusparseltError("no such library")

    monkeypatch.setattr(cusparselt, "load", refuse)
    support.cache_clear()
    try:
        table = kernel_tables([(256, 512)], torch.float16, token_counts=(1024,))[256, 512]
        layer = pruned(512, 256, torch.float16)
        rows = torch.randn(300, 512, device="cuda", dtype=torch.float16)
        converted = convert_linear(layer)
        assert relative(converted(rows), layer(rows)) < LARGEST
    finally:
        support.cache_clear()
    assert table.rows[0].kernel in (Kernel("torch"), Kernel("expand"))
    assert "no such library" in table.rows[0].notes[0]
