"""What is decided from the times, and the whole way of a run on a GPU that is pretended on the CPU."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prox24_lightning.convert import (
    ExampleInputs,
    SemiStructuredLinear,
    Settings,
    Target,
    check_model,
    convert,
    run_benchmark,
)
from prox24_lightning.convert.autotune.kernel_table import KernelTimes, choose, table_by_rule
from prox24_lightning.convert.benchmark import alternating, run, time_model
from prox24_lightning.convert.benchmark import time_layers as layer_benchmark
from prox24_lightning.convert.benchmark.chip_limits import Limits
from prox24_lightning.convert.benchmark.render import print_report, to_markdown, write_report
from prox24_lightning.convert.benchmark.report import ModelVariant, Pair, TokenResult
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.measurement import Timing, relative_error
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.errors import describe
from prox24_lightning.weights.rounding import expand_rows

HOPPER = Target("pretended H200", (9, 0), "cusparselt")
LIMITS = Limits(1e9, 1e10)
QUICK = {"token_counts": (1, 64), "rounds": 2}


def pruned(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(mask_24(layer.weight))
    return layer


class Net(nn.Module):
    """Two sparse shapes, one of them twice, a dense head and a convolution."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(pruned(nn.Linear(32, 64)), nn.ReLU(), pruned(nn.Linear(64, 32)))
        self.last = pruned(nn.Linear(32, 64))
        self.head = nn.Linear(64, 16)
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x, scale=1.0):
        return {"logits": self.head(self.last(self.body(x))) * scale, "hidden": None}


def timing(median: float) -> Timing:
    return Timing(median, median * 0.9, median * 1.1)


def result(tokens: int, eager: float, graph: float | None, error: float = 1e-3) -> TokenResult:
    """``eager`` and ``graph`` are speed-ups."""
    pairs = [None if x is None else Pair.of(timing(10.0), timing(10.0 / x)) for x in (eager, graph)]
    return TokenResult(tokens, pairs[0], pairs[1], None if graph else "not capturable", error)


@pytest.mark.parametrize(
    "run_mode, only_if_faster, sparse, decision",
    [
        ("eager", True, False, "slower (eager: 0.50 x at 1, 0.90 x at 64 tokens): stays dense"),
        ("eager", False, True, "slower (eager: 0.50 x at 1, 0.90 x at 64 tokens), sparse all the same"),
        ("graph", True, True, "sparse"),
    ],
)
def test_a_layer_that_loses_stays_dense(run_mode, only_if_faster, sparse, decision):
    settings = Settings(run_mode=run_mode, only_if_faster=only_if_faster)
    assert layer_benchmark.decide([result(1, 0.5, 1.2), result(64, 0.9, 1.0)], settings) == (sparse, decision)


def test_what_was_not_measured_is_not_faster():
    found = layer_benchmark.decide([result(1, 2.0, None)], Settings(run_mode="graph"))
    assert found == (False, "slower (graph: not captured at 1 tokens): stays dense")


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_output_is_never_worth_its_speed(error):
    sparse, decision = layer_benchmark.decide([result(1, 2.0, 2.0, error)], Settings(only_if_faster=False))
    assert not sparse
    assert "output differs from dense" in decision


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"token_counts": ()}, "token_counts=.* must be one or more whole numbers"),
        ({"token_counts": (0,)}, "token_counts=.* must be one or more whole numbers"),
        ({"token_counts": (2.5,)}, "token_counts=.* must be one or more whole numbers"),
        ({"dtype": torch.float32}, "dtype=torch.float32 has no sparse kernel"),
        ({"run_mode": "fast"}, "run_mode='fast' is unknown"),
        ({"rounds": 1}, "rounds=1 is too few"),
        ({"weights": "int4"}, "weights='int4' is unknown; use one of bf16, fp16, fp8_e4m3, int8"),
        ({"weights": "fp16"}, "weights='fp16' does not fit dtype=torch.bfloat16"),
        ({"max_error": 0.0}, r"max_error=0.0 must lie in \(0, 1\)"),
    ],
)
def test_settings_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Settings(**arguments)


def test_relative_error_over_several_tensors():
    assert relative_error([torch.ones(3), torch.zeros(2)], [torch.ones(3), torch.zeros(2)]) == 0
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([3.0]), torch.tensor([9.0])]) == 1
    assert relative_error(torch.zeros(2), torch.ones(2)) == float("inf")


def test_describe_keeps_the_first_line():
    assert describe(RuntimeError("\nCUDA went away\nstack")) == "RuntimeError: CUDA went away"
    assert describe(MemoryError()) == "MemoryError"


def test_without_a_gpu_layers_are_checked_only():
    report = run_benchmark(Net(), Settings(), device=torch.device("cpu"), reasons={"head": "left dense: output head"})
    assert report.names("fits") == ("body.0", "body.2", "last")
    assert report.names("sparse") == ()
    why = {layer.name: layer.why for layer in report.layers}
    assert why["body.0"] == "no CUDA GPU in use"
    assert why["head"].endswith("; left dense: output head")
    assert report.scalars()["convert/layers_fits"] == 3
    assert "would be sparse on a GPU" in to_markdown(report)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Packed layers multiply densely on the CPU; ``times`` says how long each kind of call takes, in microseconds."""
    times = {"dense": 10.0, "sparse": 5.0, "dense_fp8": 8.0, "all_sparse": 8.0, "chosen": 7.0}

    def tables(shapes, dtype, *, token_counts, keep_dense, device, form=None):
        assert {1, 64} <= set(token_counts)
        if form is None:
            kernels = [KernelTimes(tokens, 10.0, {"cusparselt": 6.25}) for tokens in token_counts]
            return {shape: choose(shape, kernels) for shape in shapes}
        return {shape: table_by_rule(shape, HOPPER.capability, form=form) for shape in shapes}

    def forward(self, rows):
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.form is not None:
            tokens = round_tokens(rows.flatten(0, -2), self.form)
            rows = expand_rows(tokens.values, tokens.scales, rows.dtype).view_as(rows)
        return nn.functional.linear(rows, self.weight, bias)

    def measure(variants, *, calls=1, rounds=20, prepare=lambda name: None):
        for name, call in variants.items():
            prepare(name)
            call()
        return {name: timing(times[name]) for name in variants}

    monkeypatch.setattr(layer_benchmark, "kernel_tables", tables)
    stored = lambda shape, *_, form, **__: table_by_rule(shape, HOPPER.capability, form=form)  # noqa: E731
    monkeypatch.setattr(convert, "stored_table", stored)
    monkeypatch.setattr(SemiStructuredLinear, "forward", forward)
    monkeypatch.setattr(run, "find_target", lambda device=None: HOPPER)
    monkeypatch.setattr(run, "measure_limits", lambda dtype, device: LIMITS)
    monkeypatch.setattr(convert, "target_of", lambda device: HOPPER)
    for module in (layer_benchmark, alternating):
        monkeypatch.setattr(module, "time_calls", measure)
        monkeypatch.setattr(module, "release_memory", lambda: None)
        monkeypatch.setattr(module, "capture", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(torch, "device", lambda *args: cpu)
    cpu = torch.empty(0).device
    properties = SimpleNamespace(L2_cache_size=10_000)
    for name, value in {
        "device": lambda device: nullcontext(),
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "memory_allocated": lambda device=None: 100,
        "max_memory_allocated": lambda device=None: 300,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return times


def whole(net: nn.Module) -> ExampleInputs:
    return ExampleInputs("", (torch.randn(4, 5, 32),), {"scale": 0.5})


def test_layers_and_model_are_timed_and_chosen(pretended_gpu):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kept = []
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net), keep=kept.append)
    assert [(len(part.shapes), part.names("sparse")) for part in kept] == [
        (1, ("body.0", "last")),
        (2, ("body.0", "body.2", "last")),
    ]
    assert report.notes == ()
    assert report.names("sparse") == ("body.0", "body.2", "last")
    assert [(shape.shape, shape.layers) for shape in report.shapes] == [
        ((64, 32), ("body.0", "last")),
        ((32, 64), ("body.2",)),
    ]
    assert [variant.name for variant in report.model] == ["dense", "all_sparse"]
    assert report.model[1].output_error < 1e-2
    scalars = report.scalars()
    assert scalars["convert/layers_sparse"] == 3
    assert scalars["convert/graph_layer_speedup_64_tokens"] == pytest.approx(2)
    assert scalars["convert/eager_model_speedup_all_sparse"] == pytest.approx(10 / 8)
    # (64, 32) at one token: 4096 bytes of weight and 192 of rows, at a byte a nanosecond, in 10 microseconds; packed,
    # and padded to 64 x 64, 4608 bytes in half the time.
    first = report.shapes[0]
    assert first.limit_shares(first.tokens[0], LIMITS, 2) == pytest.approx((0.4288, 0.96))
    assert scalars["convert/limit_bytes_per_second"] == 1e9
    assert scalars["convert/limit_share_dense_1_tokens"] == pytest.approx(0.4288)
    # At 64 tokens arithmetic is the longer: 2 x 64 x 64 x 32 operations, half as many for sparse, at 10 a nanosecond.
    assert scalars["convert/limit_share_dense_64_tokens"] == pytest.approx(26.2144 / 10)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("weights", ["fp8_e4m3", "int8"])
def test_rounded_layers_are_timed_beside_every_other_form(pretended_gpu, weights, tmp_path):
    torch.manual_seed(0)
    net = Net()
    report = run_benchmark(net, Settings(**QUICK, weights=weights, max_error=0.1), inputs=whole(net))
    assert report.names("sparse") == ("body.0", "body.2", "last")
    one = report.shapes[0].tokens[0]
    assert (one.fp8_graph.median_us, one.packed_16_us) == (8.0, 6.25)
    assert 1e-3 < one.output_error < 0.06
    page = to_markdown(report)
    assert f"| (out, in) | layers | tokens | dense, 16 bits | dense, float8 | 2:4, 16 bits | 2:4, {weights} |" in page
    assert "| (64, 32) | 2 | 64 | 10.0 | 8.0 | 6.2 | 5.0 |" in page
    assert "| all, x dense |  |  | 1.00 | 1.25 | 1.60 | 2.00 |" in page
    assert f"Fastest within an output error of 0.1: 2:4, {weights} (2.00 x dense, error " in report.recommendation
    assert "Others: dense, float8 1.25 x, 2:4, 16 bits 1.60 x." in report.recommendation
    assert report.scalars()["convert/graph_layer_speedup_over_fp8_64_tokens"] == pytest.approx(1.6)
    assert report.model[1].output_error < 0.1
    assert json.loads(report.to_json())["weights"] == weights
    with (tmp_path / "out").open("w") as file:
        print_report(report, Console(file=file, width=200))
    assert "Fastest within an output error" in (tmp_path / "out").read_text().splitlines()[-1]


def test_a_form_beyond_the_users_error_is_not_recommended(pretended_gpu):
    net = Net()
    report = run_benchmark(net, Settings(**QUICK, weights="fp8_e4m3", max_error=0.005), inputs=whole(net))
    assert report.names("sparse") == ()
    assert "output differs from dense by" in report.shapes[0].decision
    assert "Fastest within an output error of 0.005: 2:4, 16 bits (1.60 x dense" in report.recommendation
    assert re.search(r"2:4, fp8_e4m3 2\.00 x, error \d\.\de-02", report.recommendation)


def test_layers_that_are_fastest_dense_in_float8_take_that_form(pretended_gpu):
    pretended_gpu["dense_fp8"] = 4.0
    net = Net()
    report = run_benchmark(net, Settings(**QUICK, weights="fp8_e4m3", max_error=0.1), inputs=whole(net))
    assert report.names("sparse") == ()
    assert report.dense_fp8_names == ("body.0", "last", "body.2")
    assert report.shapes[0].decision == "slower (graph: 0.80 x at 1, 0.80 x at 64 tokens): dense in float8"
    assert [(variant.name, variant.sparse_layers) for variant in report.model] == [
        ("dense", 0),
        ("all_sparse", 3),
        ("chosen", 0),
    ]
    assert "plain float8 of the dense model gives it" in report.recommendation


def test_16_bits_have_float8_beside_them_and_no_more(pretended_gpu):
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert "| (out, in) | layers | tokens | dense, 16 bits | dense, float8 | 2:4, 16 bits |" in to_markdown(report)
    assert report.recommendation.startswith("Fastest within an output error of 0.05: 2:4, 16 bits (2.00 x dense")


def test_a_gpu_without_float8_says_not_measured(pretended_gpu, monkeypatch):
    monkeypatch.setattr(run, "find_target", lambda device=None: Target("pretended A100", (8, 0), "cusparselt"))
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert "| (64, 32) | 2 | 64 | 10.0 | not measured | 5.0 |" in to_markdown(report)
    assert "dense, float8 not measured" in report.recommendation
    with pytest.raises(ValueError, match="fp8_e4m3 needs compute capability 8.9, pretended A100 has 8.0"):
        run_benchmark(net, Settings(**QUICK, weights="fp8_e4m3"))


def test_slow_layers_and_the_note_on_graphs(pretended_gpu, monkeypatch):
    slow = {"dense": 10.0, "sparse": 20.0, "dense_fp8": 20.0}
    calls = iter([slow, None] * 100)  # eager loses, graph wins

    def measure(variants, *, calls_=calls, calls=1, rounds=20):
        times = next(calls_) or pretended_gpu
        return {name: timing(times[name]) for name in variants}

    monkeypatch.setattr(layer_benchmark, "time_calls", measure)
    net = Net()
    by_graph = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert by_graph.names("sparse") == ("body.0", "body.2", "last")
    assert "Called one by one (eager), the host's work makes sparse slower" in by_graph.notes[0]
    report = run_benchmark(net, Settings(**QUICK, run_mode="eager"), inputs=whole(net))
    assert report.names("sparse") == ()
    assert {layer.name: layer.why for layer in report.layers}["last"] == (
        "slower (eager: 0.50 x at 1, 0.50 x at 64 tokens): stays dense"
    )
    assert "Replayed from a CUDA graph, sparse wins for (64, 32) at 1, 64 tokens" in report.notes[0]
    assert [variant.name for variant in report.model] == ["dense", "all_sparse"]


def test_a_model_that_gets_slower_stays_dense_whole(pretended_gpu):
    pretended_gpu["all_sparse"] = 11.0
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert report.names("sparse") == ()
    assert "the whole model is slower with it (0.91 x, graph): stays dense" in report.layers[0].why


def test_a_layer_that_cannot_be_measured_stays_dense_and_the_rest_goes_on(pretended_gpu, monkeypatch):
    original = layer_benchmark.convert_linear

    def convert(linear, *, name, **options):
        if name == "body.0":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(linear, name=name, **options)

    monkeypatch.setattr(layer_benchmark, "convert_linear", convert)
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    why = {layer.name: (layer.state, layer.why) for layer in report.layers}
    assert why["last"] == (
        "dense",
        "could not be measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    )
    assert report.names("sparse") == ("body.2",)
    assert report.model[1].sparse_layers == 1


def test_some_layers_chosen(pretended_gpu, monkeypatch):
    decisions = iter([(True, "sparse"), (False, "slower")])
    monkeypatch.setattr(layer_benchmark, "decide", lambda tokens, settings: next(decisions))
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert report.names("sparse") == ("body.0", "last")
    assert [(variant.name, variant.sparse_layers) for variant in report.model] == [
        ("dense", 0),
        ("all_sparse", 3),
        ("chosen", 2),
    ]


def test_without_memory_for_dense_and_sparse_layers_the_variants_follow_one_another(pretended_gpu, monkeypatch):
    original = time_model.time_alternating

    def time_alternating(calls, use, rounds):
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(calls, use, rounds)

    monkeypatch.setattr(time_model, "time_alternating", time_alternating)
    decisions = iter([(True, "sparse"), (False, "slower")])
    monkeypatch.setattr(layer_benchmark, "decide", lambda tokens, settings: next(decisions))
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net))
    assert [(variant.name, variant.sparse_layers) for variant in report.model] == [
        ("dense", 0),
        ("all_sparse", 3),
        ("chosen", 2),
    ]
    assert "timed one after the other" in report.notes[0]


def test_a_hugging_face_model_with_transposed_layers(pretended_gpu):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, use_cache=False)
    model = GPT2LMHeadModel(config)
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            assert name.startswith("transformer.h.0")
            with torch.no_grad():
                module.weight.mul_(mask_24(module.weight, dim=0))
    ids = torch.randint(64, (2, 8))
    report = run_benchmark(model, Settings(**QUICK), inputs=ExampleInputs("", (), {"input_ids": ids, "labels": ids}))
    assert report.notes == ()
    assert report.names("sparse") == tuple(
        f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    assert report.model[1].output_error < 2e-2
    assert "weight.t()" in report.layers[2].why
    assert "tied" in {layer.name: layer.why for layer in report.layers}["lm_head"]


@pytest.mark.parametrize("run_mode", ["graph", "eager"])
def test_layers_that_decoding_joins_are_timed_as_one(pretended_gpu, run_mode):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            pruned(layer)
    report = run_benchmark(model, Settings(run_mode=run_mode, **QUICK))
    assert len(report.names("sparse")) == 14
    shapes = {shape.shape: shape for shape in report.shapes}
    if run_mode == "eager":
        assert all(not shape.joined for shape in report.shapes)
        return
    assert list(shapes) == [(64, 32), (32, 32), (128, 32), (32, 64)]
    whole = shapes[64, 32]
    assert whole.joined == ("q_proj", "k_proj", "v_proj")
    assert [name.rpartition(".")[2] for name in whole.layers] == 2 * ["q_proj", "k_proj", "v_proj"]
    assert (whole.products, shapes[32, 64].products) == (2, 2)
    assert whole.decision == "sparse (measured as one: q_proj + k_proj + v_proj)"
    assert whole.tokens[0].output_error < 1e-2
    assert "(64, 32) as one: q_proj + k_proj + v_proj" in to_markdown(report)


def test_a_part_of_the_model_and_a_model_that_fails(pretended_gpu):
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=ExampleInputs("body", (torch.randn(2, 32),), {}))
    assert report.model[1].sparse_layers == 2
    assert "Whole model (body)" in to_markdown(report)
    report = run_benchmark(net, Settings(**QUICK), inputs=ExampleInputs("", (torch.randn(2, 7),), {}))
    assert report.model == ()
    assert report.notes[0].startswith("Whole model not timed: RuntimeError: mat1 and mat2 shapes")
    assert report.names("sparse") == ("body.0", "body.2", "last")


def test_report_on_paper_and_screen(pretended_gpu, tmp_path):
    net = Net()
    report = run_benchmark(net, Settings(**QUICK), inputs=whole(net)).with_note("a note [with brackets]")
    json_path, page = write_report(report, tmp_path / "new" / "folder", "bench")
    stored = json.loads(json_path.read_text())
    assert stored["machine"]["GPU"] == "pretended H200"
    assert stored["shapes"][0]["tokens"][0]["eager"]["speedup"] == 2.0
    text = page.read_text()
    for expected in (
        "## Layers",
        "## Per layer, microseconds a call",
        "## Whole model",
        "## Per layer, share of what the chip can do",
        "- a note [with brackets]",
        "5.0 | 2.00",
    ):
        assert expected in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows if "(64, 32)" in line and "pretended" not in line}) <= 4
    assert sorted(path.name for path in page.parent.iterdir()) == ["bench.json", "bench.md"]
    console = Console(width=200, record=True, quiet=False)
    print_report(report, console)
    assert "a note [with brackets]" in console.export_text()


def test_json_is_strict_when_a_number_is_not_finite(tmp_path):
    report = run_benchmark(Net(), Settings(), device=torch.device("cpu"))
    variant = ModelVariant("dense", 0, timing(1.0), None, None, 1, float("nan"))
    stored = json.loads(replace(report, model=(variant,)).to_json(), parse_constant=pytest.fail)
    assert stored["model"][0]["output_error"] == "nan"


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_benchmark_on_the_gpu():
    torch.manual_seed(0)
    net = Net()
    report = run_benchmark(
        net, Settings(token_counts=(3, 256), rounds=3, only_if_faster=False, run_mode="eager"), inputs=whole(net)
    )
    assert [verdict.name for verdict in check_model(net) if verdict.fits] == ["body.0", "body.2", "last"]
    assert report.notes == ()
    assert report.names("sparse") == ("body.0", "body.2", "last")
    for shape in report.shapes:
        for tokens in shape.tokens:
            assert tokens.output_error < 1e-2
            assert tokens.graph is not None, tokens.graph_problem
            assert tokens.eager.dense.median_us > 0
    dense, sparse = report.model
    assert dense.graph is not None, dense.graph_problem
    assert sparse.graph is not None, sparse.graph_problem
    assert sparse.output_error < 2e-2
    assert dense.output_error == 0
    assert net.head.weight.device.type == "cpu"
    assert torch.cuda.memory_allocated() < 256 * 2**20, "the copies are gone"
