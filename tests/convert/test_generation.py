"""Prefill and decode calls that can be repeated, and what is made of their times."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from prox24_lightning.convert.generation import DecodeStep, linear_work, prefill_call
from prox24_lightning.convert.language_report import LanguageReport, LanguageVariant, PhaseResult, Workload
from prox24_lightning.convert.language_tables import language_figure, language_sections
from prox24_lightning.convert.limits import Limits
from prox24_lightning.convert.timing import Timing

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
    return LanguageReport(3000, 500, 3400, 0.1, "a text", (dense, sparse))


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
    assert memory[2][1][1:4] == ("7", "0.0", "0.0 (0.50 x)")
    assert memory[2][1][-1] == "5.5000"
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
