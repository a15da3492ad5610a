"""The seam: what it refuses without a GPU, and exact conversion on one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prox24_lightning.convert import (
    SemiStructuredLinear,
    Target,
    check_model,
    convert,
    convert_linear,
    convert_model,
    expand_linear,
    expand_model,
)
from prox24_lightning.convert.autotune.kernel_table import KernelTimes, choose, table_by_rule
from prox24_lightning.convert.convert import convert_dense_fp8
from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.convert.kernels.packed_buffer import buffer_bytes, to_buffer
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.layers.dense_fp8_linear import DenseFp8Linear
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.module_copy import bare_copy
from prox24_lightning.weights.rounding import expand_rows, round_weight


def pruned(layer: nn.Module, dim: int = 1) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(mask_24(layer.weight, dim=dim))
    return layer


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(pruned(nn.Linear(width, 2 * width)), nn.GELU(), pruned(nn.Linear(2 * width, width)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_a_weight_with_one_violation_is_refused_by_name_and_position():
    layer = pruned(nn.Linear(64, 32))
    with torch.no_grad():
        layer.weight[3, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(
        ValueError, match=r"blocks\.0\.fc of shape \(32, 64\) .*1 of 512 groups .*at \(3, 8\): 1, 2, 3, 0"
    ):
        convert_linear(layer, name="blocks.0.fc")


def test_a_layer_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="no CUDA GPU in use .the layer is on cpu: move it."):
        convert_linear(pruned(nn.Linear(64, 32)).bfloat16())


def test_a_model_names_unknown_and_unfit_layers():
    with pytest.raises(ValueError, match="no layer 'nope' with a weight"):
        convert_model(mlp(), ["nope"])
    with pytest.raises(ValueError, match=r"^2 of shape \(64, 128\) cannot become a sparse layer"):
        convert_model(mlp(), ["2"])


@pytest.fixture
def pretended_gpu(monkeypatch) -> list[tuple]:
    """Packing on the CPU as if there were a GPU; layers of 64 inputs win, those of 128 lose at 256 tokens."""
    asked = []

    def tables(shapes, dtype, **options):
        asked.append((tuple(shapes), dtype, options["keep_dense"]))
        us = {(128, 64): 5.0, (64, 128): 12.0}
        return {
            s: choose(s, [KernelTimes(256, 10.0, {"cusparselt:1": us[s]})], keep_dense=options["keep_dense"])
            for s in shapes
        }

    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    monkeypatch.setattr(convert, "kernel_tables", tables)
    return asked


def test_layers_that_would_be_slower_stay_dense(pretended_gpu):
    model = mlp().bfloat16()
    done = convert_model(model, token_counts=(256,))
    assert done.converted == ("0",)
    assert model[0].kernels == "256=cusparselt:1"
    assert isinstance(model[2], nn.Linear)
    why = {verdict.name: verdict.why for verdict in done.dense}["2"]
    assert why == "slower (0.83 x at 256 tokens; keep_dense=True would use cuBLAS there): stays dense"
    assert pretended_gpu == [(((128, 64), (64, 128)), torch.bfloat16, False)]
    assert {table.shape for table in done.tables} == {(128, 64), (64, 128)}


def test_kept_dense_weights_make_no_layer_slower(pretended_gpu):
    model = mlp().bfloat16()
    done = convert_model(model, token_counts=(256,), keep_dense=True)
    assert done.converted == ("0",), "cuBLAS alone is no reason to convert"
    assert model[0].dense is not None
    assert "no packed kernel is faster" in {verdict.name: verdict.why for verdict in done.dense}["2"]


FORMS = ("fp8_e4m3", "int8")


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    return round_weight(weight.detach(), form)


@pytest.fixture
def pretended_times(monkeypatch):
    """A GPU whose times of packed, dense and dense float8 weights are given."""

    def pretend(capability=(9, 0), **us):
        def tables(shapes, dtype, *, form, keep_dense, **_):
            fp8 = us.get("fp8"), "dense_fp8:0" if "fp8" in us else ""
            times = KernelTimes(256, us["dense"], {"cusparselt:1": us["packed"]}, (), *fp8)
            return {shape: choose(shape, [times], keep_dense=keep_dense, form=form) for shape in shapes}

        monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", capability, "cusparselt"))
        monkeypatch.setattr(convert, "kernel_tables", tables)
        monkeypatch.setattr(
            convert, "stored_table", lambda shape, *_, form, **__: table_by_rule(shape, (9, 0), form=form)
        )

    return pretend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token_counts", [None, (256,)])
def test_weights_are_rounded_and_expanded_exactly(pretended_times, form, token_counts):
    pretended_times(dense=10.0, packed=4.0, fp8=6.0)
    model = mlp().bfloat16()
    expected = {name: rounded(weight, form) for name, weight in model.named_parameters() if weight.dim() == 2}
    assert convert_model(model, token_counts=token_counts, weights=form).converted == ("0", "2")
    assert [(layer.form, layer.packed.dtype) for layer in (model[0], model[2])] == [(form, torch.int8)] * 2
    assert model[0].packed_weight.form == form
    assert model[0].stored_bytes == model[0].packed.nbytes == 128 * 128 * 5 // 8 + (128 + 4) * 4
    model.to(torch.float32)  # the bits of the buffer are no numbers
    assert expand_model(model) == ("0", "2")
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight)


def test_a_layer_that_is_fastest_dense_in_float8_takes_that_form(pretended_times):
    pretended_times(dense=10.0, packed=6.0, fp8=5.0)
    model = mlp().bfloat16()
    expected = rounded(model[0].weight, "fp8_e4m3")
    done = convert_model(model, token_counts=(256,), weights="fp8_e4m3")
    assert done.converted == ("0", "2")
    assert done.dense_fp8["0"] == "packed is slower than dense (0.83 x at 256 tokens): dense in float8"
    assert isinstance(model[0], DenseFp8Linear)
    assert model[0].kernels == "256=dense_fp8:0", "the way that was measured, not the one by rule"
    assert torch.equal(model[0].weight, expected)
    assert torch.equal(unpack_24(model[0].packed_weight), expected)
    other = mlp().bfloat16()
    convert_model(other, token_counts=(256,), weights="fp8_e4m3")
    other.load_state_dict(model.state_dict())
    assert expand_model(other) == ("0", "2")
    assert torch.equal(other[0].weight, expected)
    packed = convert_linear(pruned(nn.Linear(64, 128)).bfloat16(), weights="fp8_e4m3")
    with pytest.raises(RuntimeError, match="packed holds bits of dense fp8_e4m3 for torch.bfloat16"):
        packed.load_state_dict(model[0].state_dict())


@pytest.mark.parametrize(
    ("form", "us", "why"),
    [
        ("fp8_e4m3", {"dense": 4.0, "packed": 6.0, "fp8": 5.0}, "packed is slower than dense (0.67 x at 256 tokens)"),
        ("fp8_e4m3", {"dense": 4.0, "packed": 6.0}, "packed is slower than dense (0.67 x at 256 tokens): stays dense"),
        ("int8", {"dense": 4.0, "packed": 6.0, "fp8": 1.0}, "packed is slower than dense (0.67 x at 256 tokens)"),
    ],
)
def test_a_layer_that_is_fastest_in_16_bits_stays_dense(pretended_times, form, us, why):
    pretended_times(**us)
    model = mlp().bfloat16()
    before = model[0].weight.clone()
    done = convert_model(model, token_counts=(256,), weights=form)
    assert done.converted == ()
    assert why in {verdict.name: verdict.why for verdict in done.dense}["0"]
    assert torch.equal(model[0].weight, before)


def test_int8_is_not_measured_against_float8(pretended_times):
    """Its values are others: a user who asks for int8 gets it where it beats 16 bits, and float8 in a column."""
    pretended_times(dense=10.0, packed=6.0, fp8=5.0)
    model = mlp().bfloat16()
    done = convert_model(model, token_counts=(256,), weights="int8")
    assert done.converted == ("0", "2")
    assert done.tables[0].rows[0].speedup_over_fp8 == pytest.approx(5 / 6)


def test_forms_that_a_gpu_does_not_multiply_are_refused_before_anything_changes(pretended_times):
    pretended_times((8, 6), dense=10.0, packed=4.0)
    model = mlp().bfloat16()
    words = "0: fp8_e4m3 needs compute capability 8.9, pretended has 8.6: use int8 there"
    with pytest.raises(ValueError, match=words):
        convert_model(model, weights="fp8_e4m3")
    assert isinstance(model[0], nn.Linear)
    assert convert_model(model, weights="int8").converted == ("0", "2")
    with pytest.raises(ValueError, match="weights='fp16' and the model is torch.bfloat16: cast the model first"):
        convert_model(mlp().bfloat16(), weights="fp16")
    with pytest.raises(ValueError, match="weights='int4' is unknown; use one of bf16, fp16, fp8_e4m3, int8"):
        convert_model(mlp(), weights="int4")


def test_a_row_that_cannot_be_rounded_is_refused_by_the_layers_name(pretended_times):
    pretended_times(dense=10.0, packed=4.0)
    model = mlp().bfloat16()
    with torch.no_grad():
        model[2].weight[3, 0:4] = torch.tensor([float("inf"), 0, 0, 0])
    with pytest.raises(ValueError, match="2 of shape .* the weight holds NaN or inf"):
        convert_model(model, ["0", "2"], weights="int8")


def test_a_kept_dense_weight_is_the_rounded_one(pretended_times):
    pretended_times(dense=10.0, packed=4.0)
    model = mlp().bfloat16()
    expected = rounded(model[0].weight, "int8")
    convert_model(model, weights="int8", keep_dense=True)
    assert torch.equal(model[0].dense.view(torch.bfloat16), expected)
    assert torch.equal(model[0].weight, expected)


@pytest.mark.parametrize("counts", [(), (0, 8)])
def test_bad_token_counts_are_refused(counts):
    with pytest.raises(ValueError, match="must be one or more whole numbers from 1 up"):
        convert_model(nn.Sequential(nn.Linear(64, 64)), token_counts=counts)


def test_expanded_layers_are_of_the_kind_that_was_there(monkeypatch):
    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    monkeypatch.setattr(convert, "stored_table", lambda shape, *_, **__: table_by_rule(shape, (9, 0)))
    model = nn.Sequential(pruned(Conv1D(128, 64), dim=0), pruned(nn.Linear(128, 64, bias=False))).bfloat16()
    before, rows = {**model.state_dict()}, torch.randn(3, 64).bfloat16()
    expected = model(rows)
    assert convert_model(model).converted == ("0", "1")
    assert expand_model(model) == ("0", "1")
    assert [type(layer) for layer in model] == [Conv1D, nn.Linear]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(rows), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_a_gpu_nothing_is_converted():
    model = mlp()
    if torch.cuda.is_available():
        pytest.skip("says nothing where there is a GPU")
    done = convert_model(model)
    assert done.converted == ()
    assert [verdict.name for verdict in done.dense] == ["0", "2"]
    assert expand_model(model) == ()


def test_expanding_what_is_not_converted_is_an_error():
    with pytest.raises(ValueError, match="'0' is not a converted layer"):
        expand_model(mlp(), ["0"])


def packed_layer(bias: torch.Tensor | None = None, dense: bool = False) -> tuple[torch.Tensor, SemiStructuredLinear]:
    weight = pruned(nn.Linear(72, 40)).weight.detach().bfloat16()
    return weight, SemiStructuredLinear(
        to_buffer(pack_24(weight)),
        tuple(weight.shape),
        weight.dtype,
        bias,
        "16384=cusparselt",
        weight if dense else None,
    )


def test_a_converted_layer_refuses_inputs_on_other_devices():
    _, layer = packed_layer()
    with pytest.raises(RuntimeError, match="runs on CUDA only; input is on cpu, weight on cpu"):
        layer(torch.zeros(2, 72, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="has no backward"):
        layer(torch.zeros(2, 72, requires_grad=True))


def test_a_packed_layer_keeps_its_bits_under_casts():
    weight, layer = packed_layer(torch.zeros(40))
    layer = copy.deepcopy(layer.to(torch.float64))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.packed_weight.values, pack_24(weight).values)
    assert set(layer.state_dict()) == {"packed", "bias"}
    assert layer.stored_bytes == layer.packed.nbytes == 64 * 128 * 9 // 8, "padded to multiples of 64"


def test_a_kept_dense_weight_is_counted_and_not_stored():
    weight, layer = packed_layer(dense=True)
    layer.to(torch.float64)
    assert torch.equal(layer.weight, weight)
    assert set(layer.state_dict()) == {"packed"}
    assert layer.stored_bytes == layer.packed.nbytes + weight.nbytes
    assert torch.equal(expand_linear(layer).weight, weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_kept_dense_weight_follows_the_state_that_is_loaded(assign):
    weight, source = packed_layer()
    _, layer = packed_layer(dense=True)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(expand_linear(layer).weight, weight)


def test_a_state_of_another_16_bit_dtype_is_refused():
    weight, layer = packed_layer()
    half = SemiStructuredLinear(to_buffer(pack_24(weight.half())), (40, 72), torch.float16, None, "16384=cusparselt")
    before = half.packed.clone()
    stored = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    with pytest.raises(RuntimeError, match=r"0\.packed holds bits of torch\.bfloat16, and this layer reads them as"):
        nn.Sequential(half).load_state_dict(state)
    assert torch.equal(half.packed, before)
    nn.Sequential(layer).load_state_dict(state)
    nn.Sequential(layer).load_state_dict(dict(state))  # plain names and tensors, which say no dtype


@pytest.fixture
def gpu() -> torch.device:
    if not check_model(pruned(nn.Linear(16, 16)))[0].fits or not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (5 * 32, 3 * 64), (4096, 4160)])
def test_output_and_expansion(gpu, dtype, bias, shape):
    layer = pruned(nn.Linear(shape[1], shape[0], bias=bias)).to(gpu, dtype)
    converted = convert_linear(layer)
    assert torch.equal(converted.weight, layer.weight), "exactly"
    assert converted.stored_bytes == buffer_bytes(shape), "0.5625 of the dense weight, padded to multiples of 64"
    for tokens in ((1,), (7,), (3, 5), (64,), (0,)):
        rows = torch.randn(*tokens, shape[1], device=gpu, dtype=dtype)
        with torch.no_grad():
            found, expected = converted(rows), layer(rows)
        assert found.shape == expected.shape
        assert found.is_contiguous()
        if found.numel():
            assert relative(found, expected) < 1e-2
    expanded = expand_linear(converted)
    assert torch.equal(expanded.weight, layer.weight)
    assert expanded.weight.requires_grad
    assert not bias or torch.equal(expanded.bias, layer.bias)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (5 * 32, 3 * 64), (4096, 4160)])
@pytest.mark.parametrize("form", [*FORMS, "dense_fp8"])
def test_rounded_output_and_expansion(gpu, dtype, bias, shape, form):
    layer = pruned(nn.Linear(shape[1], shape[0], bias=bias)).to(gpu, dtype)
    rounding = "fp8_e4m3" if form == "dense_fp8" else form
    converted = convert_dense_fp8(layer) if form == "dense_fp8" else convert_linear(layer, weights=form)
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(rounded(layer.weight, rounding))
    assert torch.equal(converted.weight, reference.weight), "exactly"
    for tokens in ((1,), (7,), (3, 5), (64,), (300,), (0,)):
        rows = torch.randn(*tokens, shape[1], device=gpu, dtype=dtype)
        tokens_rounded = round_tokens(rows.flatten(0, -2).cpu(), rounding)
        exact = expand_rows(tokens_rounded.values, tokens_rounded.scales, dtype).view_as(rows).to(gpu)
        with torch.no_grad():
            found, expected = converted(rows), reference(exact)
        assert found.shape == expected.shape
        if found.numel():
            assert relative(found, expected) < 1e-2
    assert torch.equal(expand_linear(converted).weight, reference.weight)
    assert torch.equal(unpack_24(converted.packed_weight), reference.weight)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        assert relative(converted(rows.new_ones(3, shape[1]).float()), reference(rows.new_ones(3, shape[1]))) < 2e-2


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_inputs_that_are_not_contiguous_and_autocast(gpu):
    layer = pruned(nn.Linear(64, 128)).to(gpu, torch.bfloat16)
    converted = convert_linear(layer)
    rows = torch.randn(64, 24, device=gpu, dtype=torch.bfloat16).t()
    with torch.no_grad():
        assert relative(converted(rows), layer(rows)) < 1e-2
        with torch.autocast("cuda", torch.bfloat16):
            assert relative(converted(rows.float()), layer(rows)) < 1e-2
        with pytest.raises(RuntimeError, match="cast the input"):
            converted(rows.float())
    with torch.inference_mode():
        assert converted(rows).shape == (24, 128)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_model_there_and_back(gpu):
    model = mlp().to(gpu, torch.bfloat16)
    model.append(nn.Linear(64, 64, device=gpu, dtype=torch.bfloat16))
    twin = bare_copy(model, device=gpu)
    rows = torch.randn(16, 64, device=gpu, dtype=torch.bfloat16)
    done = convert_model(twin)
    assert done.converted == ("0", "2")
    assert [(verdict.name, "not 2:4" in verdict.why) for verdict in done.dense] == [("3", True)]
    with torch.no_grad():
        assert relative(twin(rows), model(rows)) < 2e-2
    stored = io.BytesIO()
    torch.save(twin.state_dict(), stored)
    stored.seek(0)
    twin.load_state_dict(torch.load(stored, weights_only=True, map_location=gpu))
    twin.cpu().to(gpu)  # what a trainer does between two runs
    assert expand_model(twin, ["0"]) == ("0",)
    assert expand_model(twin) == ("2",)
    for name, parameter in model.named_parameters():
        assert torch.equal(twin.get_parameter(name), parameter), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_transposed_layer_becomes_a_linear_one(gpu):
    layer = pruned(Conv1D(128, 64), dim=0).to(gpu, torch.bfloat16)
    rows = torch.randn(3, 5, 64, device=gpu, dtype=torch.bfloat16)
    converted = convert_linear(layer)
    with torch.no_grad():
        assert relative(converted(rows), layer(rows)) < 1e-2
    assert torch.equal(expand_linear(converted).weight, layer.weight)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_violation_is_refused_on_the_gpu_too(gpu):
    layer = pruned(nn.Linear(64, 32)).to(gpu, torch.bfloat16)
    with torch.no_grad():
        layer.weight[3, 8:12] = 1
    with pytest.raises(ValueError, match=r"at \(3, 8\)"):
        convert_linear(layer)
