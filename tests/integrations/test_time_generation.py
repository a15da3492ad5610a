"""Times of whole calls of ``generate``: in transformers, and in vLLM, which is pretended here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf

from prox24_lightning.convert import SemiStructuredLinear
from prox24_lightning.convert.benchmark.generation_report import Generation, generation_notes, generation_section
from prox24_lightning.integrations.transformers import time_generation as timing
from prox24_lightning.integrations.vllm import time_generation as serving
from prox24_lightning.integrations.vllm.served_rates import Serving
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.long_work import watched

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def tiny(**more):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **more})).eval()


def test_both_loops_make_the_tokens_and_are_undone(monkeypatch):
    model = tiny()
    models = {"dense": model, "converted": copy.deepcopy(model)}
    made = []

    def host_seconds(calls, rounds):
        made.append({name: tuple(call().shape) for name, call in calls.items()})
        return {"dense": 2.0, "converted": 1.0}

    monkeypatch.setattr(timing, "host_seconds", host_seconds)
    rows = timing.time_generation(models, [1, 3], prompt=5, new=4)
    assert made == [{"dense": (batch, 9), "converted": (batch, 9)} for batch in (1, 3, 1, 3)]
    assert rows == tuple(
        Generation(host, batch, 5, 4, dense=batch * 2.0, converted=batch * 4.0)
        for host in timing.HOSTS.values()
        for batch in (1, 3)
    )
    assert all("generate" not in vars(one) for one in models.values())


def test_the_same_static_cache_and_greedy_tokens_in_both_loops():
    model = tiny()
    call = timing.generation_call(model, 2, 5, 6)
    assert call.keywords["cache_implementation"] == "static"
    handle = timing.accelerate_generation(model)
    accelerated = timing.generation_call(model, 2, 5, 6)()
    handle.remove()
    assert torch.equal(call(), accelerated)


def test_a_way_that_fails_is_a_row_with_the_reason():
    model = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=4)).eval()
    kept = []
    accelerated, ordinary = timing.time_generation({"dense": model}, [1], prompt=4, new=2, rounds=1, keep=kept.append)
    assert kept == [accelerated, ordinary]
    assert ordinary.dense
    assert ordinary.dense > 0
    assert accelerated.dense is None
    assert "cannot be accelerated: its layers attend to parts" in accelerated.problem
    model.forward = None
    [failed] = timing.time_generation({"dense": model}, [1], prompt=4, new=2, hosts=["transformers", "vllm"])
    assert failed.problem.startswith("TypeError: ")


def test_it_says_what_comes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "host_seconds", lambda calls, rounds: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(timing, "release_memory", lambda: None)
    said = []
    with watched(said.append):
        timing.time_generation({"dense": tiny()}, [1, 2], prompt=4, new=2)
    assert [line.rpartition(", 4 + 2 tokens")[0] for line in said] == [
        f"generate() of {host}, batch {batch}" for host in timing.HOSTS.values() for batch in (1, 2)
    ]
    assert [line.endswith("compiles the whole model for it, which may take minutes") for line in said] == [
        False,
        False,
        True,
        True,
    ]


def test_rows_as_a_table_and_notes():
    rows = (Generation("a", 8, 512, 128, 1000.4, 1300.0), Generation("b", 1, 512, 128, 70.0, problem="no memory"))
    assert generation_section(rows)[2] == [
        ("a", "8", "512 + 128", "1,000", "1,300", "1.30"),
        ("b", "1", "512 + 128", "70", "-", "-"),
    ]
    assert generation_notes(rows) == ["generate() of b, batch 1, not timed: no memory"]


VLLM = """
import json, sys, time
class SamplingParams:
    def __init__(self, **options):
        self.options = options
class LLM:
    def __init__(self, model, **options):
        if model.endswith("broken"):
            print("Traceback ...", file=sys.stderr)
            print("ValueError: no such quantization", file=sys.stderr)
            print("resource_tracker: leaked", file=sys.stderr)
            sys.exit(1)
        print("noise of the engine")
        self.model, self.options = model, options
    def generate(self, prompts, settings, use_tqdm):
        with open(self.model + ".jsonl", "a") as file:
            sizes = [len(one["prompt_token_ids"]) for one in prompts]
            top = max(max(one["prompt_token_ids"]) for one in prompts)
            print(json.dumps([sizes, top, settings.options, self.options]), file=file)
        time.sleep(0.01)
"""


@pytest.fixture
def pretended_vllm(tmp_path, monkeypatch):
    home = tmp_path / "site"
    home.mkdir()
    (home / "vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setenv("PYTHONPATH", str(home), prepend=":")


def test_vllm_is_timed_in_processes_of_its_own(pretended_vllm, tmp_path):
    assert serving.is_installed()
    asked = Serving("bfloat16", (1, 3), prompt=5, new=4, rounds=2, vocabulary=64)
    rows = serving.time_vllm({"dense": tmp_path / "dense", "converted": tmp_path / "broken"}, asked)
    for row, batch in zip(rows, (1, 3), strict=True):
        assert (row.host, row.batch, row.prompt, row.new, row.converted) == ("vLLM", batch, 5, 4, None)
        assert 0 < row.dense <= batch * 4 / 0.01
        assert row.problem == "converted: ValueError: no such quantization"
    calls = [json.loads(line) for line in (tmp_path / "dense.jsonl").read_text().splitlines()]
    assert [call[0] for call in calls] == [[5]] * 3 + [[5, 5, 5]] * 3
    _, top, sampling, engine = calls[-1]
    assert top < 64
    assert sampling == {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False}
    assert engine["max_model_len"] == 9
    assert engine["enable_prefix_caching"] is False


@pytest.mark.gpu
# What torch says while it compiles transformers' own loop: of rotary embeddings, and of the first graph of its memory.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32", "ignore:The CUDA Graph is empty")
def test_both_forms_share_what_is_not_converted():
    model = tiny(hidden_size=128, intermediate_size=256, num_attention_heads=4).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(mask_24(parameter))
    names = ["model.layers.0.mlp.up_proj"]
    models = timing.dense_and_converted(model, names, torch.bfloat16, torch.device("cuda", 0))
    dense, converted = models["dense"], models["converted"]
    assert isinstance(converted.model.layers[0].mlp.up_proj, SemiStructuredLinear)
    assert dense.model.embed_tokens.weight is converted.model.embed_tokens.weight
    rows = timing.time_generation(models, [2], prompt=8, new=20, rounds=2)
    assert [row.problem for row in rows] == ["", ""]
    assert all(row.speedup > 0 for row in rows)
