"""Prefill and decode calls that can be repeated, and what is made of their times."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from prox24_lightning.convert import Settings
from prox24_lightning.convert.benchmark import alternating
from prox24_lightning.convert.benchmark import time_language_model as generation
from prox24_lightning.convert.benchmark.chip_limits import Limits, measure_limits
from prox24_lightning.convert.benchmark.language_report import LanguageReport, LanguageVariant, PhaseResult, Workload
from prox24_lightning.convert.benchmark.render_language import language_figure, language_sections
from prox24_lightning.convert.benchmark.time_language_model import (
    DecodeStep,
    linear_operations,
    linear_work,
    prefill_call,
    time_language_model,
)
from prox24_lightning.convert.measurement import Timing
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.long_work import watched

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2 with a window": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **WINDOWS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_decode_step_is_the_next_token_again_and_again(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    prompt = torch.randint(64, (3, 10))
    step = DecodeStep(model, prompt)
    expected = model(torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1:]
    for _ in range(3):
        torch.testing.assert_close(step(), expected)
    prefill = prefill_call(model, prompt)()
    assert prefill.shape == (3, 1, 64)
    torch.testing.assert_close(prefill, model(prompt).logits[:, -1:])


def test_the_cache_is_counted():
    model = MODELS["llama"]().eval()
    step = DecodeStep(model, torch.randint(64, (3, 10)))
    assert step.cache_bytes == 2 * 2 * 3 * 10 * 16 * 4  # keys and values, layers, sequences, tokens, width, float32


def test_a_model_without_layers_in_its_cache_is_refused():
    model = lambda *args, **options: SimpleNamespace(past_key_values=((1, 2),))  # noqa: E731
    model.forward = lambda ids: None
    with pytest.raises(ValueError, match="keeps a tuple, which has no layers"):
        DecodeStep(model, torch.zeros(1, 2, dtype=torch.long))


def test_work_counts_linear_layers_with_the_head():
    model = MODELS["gpt2"]()
    weights = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 64 * 32
    assert linear_work(model.bfloat16()) == (2 * weights, weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("workload", [Workload("prefill", 2, 10), Workload("decode", 3, 10)])
@torch.no_grad()
def test_operations_are_those_of_the_call(family, workload):
    """In prefill the head multiplies the last token of each sequence alone."""
    model = MODELS[family]().eval()
    prompt = torch.randint(64, (workload.batch, workload.length))
    call = prefill_call(model, prompt) if workload.phase == "prefill" else DecodeStep(model, prompt)
    done = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D":
            layer.register_forward_hook(
                lambda layer, args, out: done.append(2 * layer.weight.numel() * out.numel() // out.shape[-1])
            )
    call()
    assert linear_operations(model, workload) == sum(done)


PREFILL, DECODE = Workload("prefill", 2, 100), Workload("decode", 8, 50)


def timing(median):
    return Timing(median, median, median)


def result(workload, eager, graph, moved=1000):
    return PhaseResult(workload, timing(eager), graph and timing(graph), None, 2**20, moved, 4000)


def report():
    dense = LanguageVariant("dense", 0, 2000, 1000, (result(PREFILL, 10, None), result(DECODE, 20, 8)), 0.0, 5.5)
    sparse = LanguageVariant(
        "converted", 7, 1500, 500, (result(PREFILL, 5, None), result(DECODE, 40, 4, 500)), 1e-3, 5.5
    )
    return LanguageReport(3000, 500, 3_400_000, 0.1, "a text", (dense, sparse))


def test_speedups_and_rates():
    found = report()
    assert found.speedups("eager") == {PREFILL: 2.0, DECODE: 0.5}
    assert found.speedups("graph") == {DECODE: 2.0}
    assert found.variants[0].phases[0].tokens_per_second("eager") == 200 / 10e-6
    assert found.variants[0].phases[1].tokens_per_second("graph") == 8 / 8e-6
    assert found.variants[0].phases[0].tokens_per_second("graph") is None
    assert found.variants[1].phases[1].best.median_us == 4
    assert replace(found, variants=found.variants[:1]).speedups("eager") == {}


def test_scalars_for_loggers():
    scalars = report().scalars()
    assert scalars["convert/eager_decode_8x50_speedup"] == 0.5
    assert scalars["convert/graph_decode_8x50_speedup"] == 2.0
    assert scalars["convert/decode_8x50_tokens_per_second_converted"] == 8 / 4e-6
    assert scalars["convert/linear_bytes_converted"] == 1500
    assert scalars["convert/perplexity_dense"] == 5.5
    assert scalars["convert/logits_error_converted"] == 1e-3


def test_tables_say_time_use_memory_and_quality():
    time, use, memory = language_sections(report(), Limits(1e9, 1e9))
    assert [row[:6] for row in time[2]] == [
        ("prefill", "2 x 100", "eager", "0.010", "0.005", "2.00"),
        ("decode", "8 x 50", "eager", "0.020", "0.040", "0.50"),
        ("decode", "8 x 50", "graph", "0.008", "0.004", "2.00"),
    ]
    # 1000 bytes in 8 microseconds are 125 MB/s, an eighth of the limit; 4000 operations in it are half a GFLOP/s.
    assert use[2][1] == ("decode", "8 x 50", "dense", "0.00", "12%", "0.0", "50%")
    assert memory[2][1] == ("converting, 0.1 s", "", "", "", "3.2", "", "")
    assert memory[2][2][1:4] == ("7", "0.0", "0.0 (0.50 x)")
    assert memory[2][2][-1] == "5.5000"
    assert memory[1][-1] == "perplexity (a text)"
    assert all(len(row) == len(header) for _, header, rows in (time, use, memory) for row in rows)


def test_the_figure_has_a_panel_for_each_workload():
    figure = language_figure(report(), "a title")
    assert [axis.get_title() for axis in figure.axes] == ["prefill 2 x 100: 2.00 x", "decode 8 x 50: 2.00 x"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [8 / 8e-6, 8 / 4e-6]


def test_the_floor_is_the_longer_of_moving_and_computing():
    limits = Limits(2e12, 8e14)
    assert limits.floor_us(2e6, 0) == pytest.approx(1)
    assert limits.floor_us(2e6, 8e10) == pytest.approx(100)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Memory is counted by a made-up rule, calls are made once and take as long as it says, graphs are calls."""
    state = SimpleNamespace(converted=[])

    def measure(variants, *, rounds, prepare=None):
        for name, call in variants.items():
            if prepare is not None:
                prepare(name)
            call()
        return {name: timing(10.0 if prepare is not None else 5.0) for name in variants}

    for name, value in {
        "memory_allocated": lambda device=None: 3100,
        "max_memory_allocated": lambda device=None: 3700,
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(alternating, "time_calls", measure)
    monkeypatch.setattr(alternating, "capture", lambda call: SimpleNamespace(replay=call))
    for module in (alternating, generation):
        monkeypatch.setattr(module, "release_memory", lambda: None)
    monkeypatch.setattr(
        generation,
        "convert_model",
        lambda model, names, **options: state.converted.append((model, list(names), options)),
    )
    return state


NAMES = [f"model.layers.{block}.mlp.{part}_proj" for block in (0, 1) for part in ("gate", "up", "down")]


def measured(model, **options):
    settings = Settings(rounds=2)
    return time_language_model(model, NAMES, [PREFILL, DECODE], settings, torch.device("cpu"), **options)


def test_what_has_been_measured_is_kept_after_each_workload(pretended_gpu):
    kept, said = [], []
    with watched(said.append):
        found = measured(MODELS["llama"](), keep=kept.append)
    assert [[result.workload for result in one.variants[1].phases] for one in kept] == [[PREFILL], [PREFILL, DECODE]]
    assert kept[-1].variants == found.variants
    assert [line.partition(",")[0] for line in said][-2:] == ["prefill", "decode"]


def test_a_language_model_is_measured_dense_then_converted(pretended_gpu):
    model = MODELS["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scored = []
    found = measured(model, score=lambda twin: scored.append(twin) or 7.0 + len(scored), text="a text")
    [(twin, names, options)] = pretended_gpu.converted
    assert options == {"keep_dense": False, "weights": None, "dense_fp8": ()}
    assert twin is not model
    assert names == NAMES
    assert scored == [twin, twin]
    tensors = (*twin.parameters(), *twin.buffers())
    assert found.dense_bytes == sum(tensor.nbytes for tensor in tensors)
    assert found.conversion_peak_bytes == found.dense_bytes + 600, "what the conversion adds to what is allocated"
    assert found.largest_layer_bytes == 2 * 32 * 64
    dense, converted = found.variants
    assert (dense.name, dense.sparse_layers, dense.perplexity) == ("dense", 0, 8.0)
    assert (converted.name, converted.sparse_layers, converted.perplexity) == ("converted", 6, 9.0)
    assert dense.linear_bytes == linear_work(model.bfloat16())[0]
    assert dense.sparse_bytes == 2 * 6 * 32 * 64
    assert [result.workload for result in dense.phases] == [PREFILL, DECODE]
    assert [(result.eager.median_us, result.graph.median_us) for result in dense.phases] == [(10, 5), (10, 5)]
    prefill, decode = dense.phases
    assert prefill.bytes_moved == dense.linear_bytes
    assert decode.bytes_moved == dense.linear_bytes + 2 * 2 * 8 * 50 * 16 * 2
    assert prefill.operations == 2 * (200 * linear_work(model)[1] - 198 * 64 * 32), "the head takes 2 tokens of 200"
    assert converted.output_error == 0.0
    model.float()
    assert all(torch.equal(value.bfloat16(), before[name].bfloat16()) for name, value in model.state_dict().items())


def test_what_is_converted_is_not_kept_beside_it(pretended_gpu, monkeypatch):
    replaced, alive = [], []

    def convert(model, names, **options):
        for name in names:
            layer = model.get_submodule(name)
            replaced.append(weakref.ref(layer))
            model.set_submodule(name, copy.deepcopy(layer))

    monkeypatch.setattr(generation, "convert_model", convert)
    measured(MODELS["llama"](), score=lambda twin: alive.append([layer() for layer in replaced]) or 1.0)
    assert alive == [[], [None] * len(NAMES)]


def test_dense_and_converted_layers_take_turns_in_one_model(pretended_gpu, monkeypatch):
    def convert(model, names, **options):
        for name in names:
            layer = model.get_submodule(name)
            layer.converted = True

    used = []

    def measure(variants, *, rounds, prepare=None):
        for _ in range(rounds if prepare is not None else 0):
            for name, call in variants.items():
                prepare(name)
                used.append((name, [hasattr(seen[0].get_submodule(layer), "converted") for layer in NAMES]))
                call()
        return {name: timing(1.0) for name in variants}

    seen = []
    monkeypatch.setattr(generation, "convert_model", convert)
    monkeypatch.setattr(alternating, "time_calls", measure)
    found = measured(MODELS["llama"](), score=lambda model: seen.append(model) or 1.0)
    assert found.timed_in_turn
    assert used == [("dense", [False] * 6), ("converted", [True] * 6)] * 2 * 2, "two rounds of two workloads"
    assert all(hasattr(seen[0].get_submodule(layer), "converted") for layer in NAMES)


@pytest.mark.parametrize("full", ["while copying", "while timing"])
def test_without_memory_for_both_they_are_timed_one_after_the_other(pretended_gpu, monkeypatch, full):
    def convert(model, names, **options):
        for name in names:
            model.get_submodule(name).converted = True

    copies, order = [], []

    def copied(module, **options):
        made = copy.deepcopy(module).to(options["dtype"])
        copies.append(made)
        if len(copies) == 3 and full == "while copying":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    def measure(variants, *, rounds, prepare=None):
        if len(variants) > 1:
            prepare("dense")
            raise torch.OutOfMemoryError("CUDA out of memory")
        if prepare is not None:
            order.append((*variants, hasattr(copies[0].get_submodule(NAMES[0]), "converted")))
        return {name: timing(1.0) for name in variants}

    monkeypatch.setattr(generation, "convert_model", convert)
    monkeypatch.setattr(generation, "bare_copy", copied)
    monkeypatch.setattr(alternating, "time_calls", measure)
    found = measured(MODELS["llama"]())
    assert not found.timed_in_turn
    assert order == [("converted", True)] * 2 + [("dense", False)] * 2
    assert [variant.name for variant in found.variants] == ["dense", "converted"]
    assert all(len(variant.phases) == 2 for variant in found.variants)
    assert "one after the other" in language_sections(found, None)[0][0]


def test_what_cannot_be_captured_is_timed_eagerly(pretended_gpu, monkeypatch):
    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(alternating, "capture", capture)
    found = measured(MODELS["llama"]())
    assert found.variants[0].phases[0].graph is None
    assert found.variants[0].phases[0].graph_problem.startswith("RuntimeError: operation not permitted")
    assert found.variants[0].perplexity is None
    assert found.text is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_language_model_on_the_gpu():
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 1024}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_submodule(name).weight
            weight.mul_(mask_24(weight))
    workloads = [Workload("prefill", 2, 100), Workload("decode", 8, 50)]
    device = torch.device("cuda", torch.cuda.current_device())
    found = time_language_model(model, NAMES, workloads, Settings(rounds=3), device, score=lambda twin: 1.0)
    dense, converted = found.variants
    for variant in found.variants:
        for result in variant.phases:
            assert result.graph is not None, result.graph_problem
            assert 0 < result.graph.median_us <= 1.5 * result.eager.median_us
            assert result.peak_bytes >= found.dense_bytes / 2
    assert dense.output_error == 0.0
    assert 0 < converted.output_error < 2e-2
    assert converted.sparse_bytes == pytest.approx(0.5625 * dense.sparse_bytes)
    # Packing works on parts of some MiB, which is more than layers as small as these.
    assert found.conversion_peak_bytes <= found.dense_bytes + found.largest_layer_bytes + 16 * 2**20


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_a_replayed_decode_step_gives_the_same_logits():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval().cuda()
    step = DecodeStep(model, torch.randint(64, (3, 10), device="cuda"))
    expected = step().clone()
    held = []
    graph = capture(lambda: held.append(step()))
    for _ in range(3):
        held[-1].fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(held[-1], expected)


@pytest.mark.gpu
def test_limits_of_the_gpu():
    limits = measure_limits(torch.bfloat16, torch.device("cuda", torch.cuda.current_device()), rounds=3)
    assert 1e11 < limits.bytes_per_second < 1e13
    assert 1e13 < limits.operations_per_second < 1e16
