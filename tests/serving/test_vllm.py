"""vLLM answers from packed folders as transformers does from the dense model; run by ``make test-vllm``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from contextlib import suppress

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import transformers as hf  # noqa: E402
from tiny_language import tiny_tokenizer  # noqa: E402
from vllm.config import ModelConfig, VllmConfig  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402

from prox24_lightning.convert import find_packable  # noqa: E402
from prox24_lightning.integrations.vllm import plugin  # noqa: E402
from prox24_lightning.integrations.vllm.served_rates import Serving  # noqa: E402
from prox24_lightning.integrations.vllm.time_generation import time_vllm  # noqa: E402
from prox24_lightning.io.packed_folder import load_folder, save_folder  # noqa: E402
from prox24_lightning.mask import mask_24  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 62,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
}
TOKENS = 64


def sparse_model(name, dense=()):
    """A 2:4 model with random weights that are large enough for its tokens to differ."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**SIZES, **({"head_dim": 32} if name == "qwen3" else {}))).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            if "proj" in key and parameter.dim() == 2 and not any(part in key for part in dense):
                parameter.mul_(mask_24(parameter))
    return model


def pack(folder, model, **options):
    save_folder(folder, model, find_packable(model), source="a test", **options)
    return folder


def prompts():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(2, 62, (length,), generator=draw).tolist() for length in (5, 9, 1, 17, 3, 8, 12, 2) * 2]


@torch.no_grad()
def check_greedy(model, asked, answers):
    """Every token of an answer is the one that ``model`` finds likeliest after the prompt and the tokens before it."""
    for prompt, answer in zip(asked, answers, strict=True):
        assert len(answer) == TOKENS
        likeliest = model(torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
        assert answer == likeliest[len(prompt) - 1 : -1]


@pytest.fixture(autouse=True)
def _engine_in_this_process(monkeypatch):
    """A process of its own for each engine would load torch and vLLM anew; the server has such."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def served(folder, *batches, eager=True):
    """Answers of one engine of vLLM to several batches of prompts."""
    settings = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    answers = []
    with warnings.catch_warnings(action="ignore"):  # vLLM's own
        engine = vllm.LLM(
            str(folder),
            dtype="float32",
            enforce_eager=eager,
            max_model_len=128,
            skip_tokenizer_init=True,
            seed=0,
            gpu_memory_utilization=0.3,  # of the memory of the CPU, which others may use
        )
        for batch in batches:
            found = engine.generate([{"prompt_token_ids": prompt} for prompt in batch], settings, use_tqdm=False)
            answers.append([list(one.outputs[0].token_ids) for one in found])
    return answers


@pytest.mark.parametrize(("name", "eager"), [("llama", True), ("qwen2", True), ("qwen3", True), ("llama", False)])
def test_the_same_tokens_as_transformers(name, eager, tmp_path):
    model = sparse_model(name)
    folder = pack(tmp_path / "packed", model)
    asked = prompts()
    one, four, all_of_them = served(folder, asked[:1], asked[:4], asked, eager=eager)
    check_greedy(model, asked, all_of_them)
    assert (one, four) == (all_of_them[:1], all_of_them[:4])
    assert len({tuple(answer) for answer in all_of_them}) > 8, "the prompts lead to different answers"


def test_a_folder_of_8_bits_is_served_as_transformers_loads_it(tmp_path):
    folder = pack(tmp_path / "packed", sparse_model("llama"), weights="fp8_e4m3")
    asked = prompts()[:4]
    (answers,) = served(folder, asked)
    check_greedy(load_folder(folder, hf.AutoModelForCausalLM), asked, answers)


@pytest.mark.slow
def test_bench_times_both_forms(tmp_path):
    model = sparse_model("llama")
    model.save_pretrained(tmp_path / "dense")
    folders = {"dense": tmp_path / "dense", "converted": pack(tmp_path / "packed", model)}
    asked = Serving("float32", (1, 2), prompt=8, new=8, rounds=1, vocabulary=62, eager=True)
    rows = time_vllm(folders, asked)
    assert [(row.host, row.batch, row.problem) for row in rows] == [("vLLM", 1, ""), ("vLLM", 2, "")]
    assert all(row.dense > 0 and row.converted > 0 for row in rows)


def test_groups_that_run_as_one_layer_are_dense_as_a_whole(tmp_path):
    model = sparse_model("llama", dense=("k_proj", "layers.0.mlp.up_proj"))
    packable = find_packable(model)
    stored = {name for name in packable.dense if "proj" in name}
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    assert "model.layers.0.mlp.gate_proj.weight" in stored
    assert "model.layers.1.mlp.gate_proj.weight" in packable.dims
    folder = pack(tmp_path / "packed", model)
    asked = prompts()[:2]
    (answers,) = served(folder, asked)
    check_greedy(model, asked, answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "packed in version 9 of the format"),
        ({"weights": "int4"}, "weights='int4' of the quantization_config is none of fp8_e4m3, int8"),
        ({"packed_along_outputs": ["model.layers.0.mlp.up_proj.weight"]}, "which vLLM cannot load"),
    ],
)
def test_folders_that_cannot_be_served_are_refused(change, message, tmp_path):
    folder = pack(tmp_path / "packed", sparse_model("llama"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plugin.Prox24Config.from_config(config)
    with pytest.raises(ValueError, match=message):
        plugin.Prox24Config.from_config({**config, **change})


def test_a_damaged_tensor_is_refused(tmp_path):
    folder = pack(tmp_path / "packed", sparse_model("llama"))
    config = plugin.Prox24Config.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    config.maybe_update_config("owner/name", revision="main")
    content = bytearray((folder / "packed.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "packed.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="packed.safetensors is damaged: the checksum of "):
        VllmConfig(model_config=ModelConfig(str(folder), skip_tokenizer_init=True))


def test_a_group_that_is_packed_in_part_is_refused():
    config = plugin.Prox24Config(["model.layers.0.self_attn.k_proj"])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = LinearBase.__new__(LinearBase)
    with pytest.raises(ValueError, match=r"as one layer, and model\.layers\.0\.self_attn\.k_proj is stored dense"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    mixed = plugin.Prox24Config([], "int8", ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"])
    mixed.packed_modules_mapping = config.packed_modules_mapping
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj is not rounded to 8 bits"):
        mixed.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert mixed.get_quant_method(layer, "model.layers.1.self_attn.o_proj").form is None
    assert mixed.get_quant_method(layer, "model.layers.1.self_attn.qkv_proj").form == "int8"


def test_the_server_answers(tmp_path):
    """Server and engine are two processes, which find the plugin by themselves."""
    model = sparse_model("llama")
    folder, port = pack(tmp_path / "packed", model), free_port()
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    prompt = prompts()[0]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :]
    # The module behind `vllm serve`: the command itself asks for the version of a package named vllm, which the CPU
    # build is not.
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*module, *settings, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    asked = {"model": str(folder), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    try:
        answer = post(f"http://127.0.0.1:{port}/v1/completions", asked, server, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert answer["choices"][0]["text"].split() == tokenizer.decode(expected).split()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(url, content, server, log):
    """Ask until the server is up."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return json.load(found)
        except urllib.error.URLError:
            time.sleep(1)
    raise TimeoutError(url)
