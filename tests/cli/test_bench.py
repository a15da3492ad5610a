"""``prox24 bench``: what it refuses, and what it writes where a GPU is pretended."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
import transformers as hf

from prox24_lightning.cli import bench as command
from prox24_lightning.cli import generation_rows
from prox24_lightning.cli.layer_dtype import layer_dtype
from prox24_lightning.convert import Target, check_model
from prox24_lightning.convert.benchmark import run
from prox24_lightning.convert.benchmark.chip_limits import Limits
from prox24_lightning.convert.benchmark.generation_report import Generation
from prox24_lightning.convert.benchmark.language_report import LanguageReport, LanguageVariant, PhaseResult, Workload
from prox24_lightning.convert.benchmark.report import LayerOutcome, ShapeResult
from prox24_lightning.convert.benchmark.run import empty_report
from prox24_lightning.convert.measurement import Timing
from prox24_lightning.integrations.vllm.served_rates import Serving

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HOPPER = Target("pretended H200", (9, 0), "cusparselt")


@pytest.mark.parametrize(
    "target, model, words, message",
    [
        (None, "sparse", [], "there is no CUDA GPU here, so nothing can be timed: .* prox24 doctor lists what could"),
        (Target("P100", (6, 0), "cusparselt"), "sparse", [], "nothing runs sparse on this GPU: P100 has compute"),
        (HOPPER, "dense", [], "can run sparse here; prox24 doctor gives the reasons"),
        (HOPPER, "sparse", ["--prefill", "0"], "prefill, context, batches and length must be 1 or more"),
        (HOPPER, "sparse", ["--batches", "[0]"], "prefill, context, batches and length must be 1 or more"),
        (HOPPER, "sparse", ["--token_counts", "[-1]"], "token_counts=.* must be one or more whole numbers"),
        (
            HOPPER,
            "sparse",
            ["--length", "10000000"],
            "the text .* holds .* tokens, which make 0 sequences of 10000000, but 16",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    prox24, sparse_folder, dense_folder, monkeypatch, tmp_path, target, model, words, message
):
    for module in (command, run):
        monkeypatch.setattr(module, "find_target", lambda device=None: target)
    folder = {"sparse": sparse_folder, "dense": dense_folder}[model]
    code, _, err = prox24("bench", folder, "--output", tmp_path / "out", *words)
    assert code == 2
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused_first(prox24, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = prox24("bench", "nowhere", "--output", tmp_path / "file")
    assert code == 2
    assert err.startswith(f"prox24 bench: {tmp_path / 'file'} cannot be a folder, because")


def timing(median):
    return Timing(median, median, median)


def one_phase(workload):
    result = PhaseResult(workload, timing(20.0), timing(5.0), None, 2**20, 500, 4000)
    return tuple(LanguageVariant(name, 1, 1000, 1000, (result,), 0.0, None) for name in ("dense", "converted"))


@pytest.fixture
def pretended(monkeypatch):
    """A GPU on which everything was measured before; what the command asks for is kept."""
    asked = {}
    limits = Limits(4e12, 8e14)

    def run_benchmark(model, settings, *, inputs, keep):
        asked["settings"], asked["inputs"] = settings, inputs
        verdicts = check_model(model, target=HOPPER)
        layers = tuple(
            LayerOutcome(v.name, v.kind, v.shape, "sparse" if v.runs and asked["wins"] else "dense", v.why)
            for v in verdicts
        )
        shapes = (ShapeResult((16, 16), False, tuple(v.name for v in verdicts if v.runs), 0, 0, (), True, ""),)
        return replace(empty_report(settings, HOPPER), layers=layers, shapes=shapes, limits=limits)

    def time_language_model(model, names, workloads, settings, device, *, score, text, dense_fp8, keep):
        asked["names"], asked["workloads"], asked["text"] = names, workloads, text
        if asked.get("fails"):
            raise asked["fails"]
        if asked.get("stops"):
            keep(LanguageReport(1000, 100, 1100, 0.1, text, one_phase(workloads[0])))
            asked["stops"]()
        value = None if score is None else score(model)
        results = {
            "dense": tuple(PhaseResult(w, timing(20.0), timing(10.0), None, 2**20, 1000, 4000) for w in workloads),
            "converted": tuple(PhaseResult(w, timing(20.0), timing(5.0), None, 2**20, 500, 4000) for w in workloads),
        }
        variants = tuple(
            LanguageVariant(name, len(names), 1000, 1000, phases, 0.0, value) for name, phases in results.items()
        )
        return LanguageReport(1000, 100, 1100, 0.1, text, variants)

    asked["wins"] = True
    monkeypatch.setattr(command, "find_target", lambda: HOPPER)
    monkeypatch.setattr(command, "run_benchmark", run_benchmark)
    monkeypatch.setattr(command, "time_language_model", time_language_model)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(generation_rows, "is_installed", lambda: False)

    def dense_and_converted(model, names, dtype, device, *, keep_dense, weights, dense_fp8):
        asked["generated"], asked["weights"] = names, weights
        if asked.get("no room"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return {"dense": model, "converted": model}

    monkeypatch.setattr(generation_rows, "dense_and_converted", dense_and_converted)
    return asked


def interrupts():
    raise KeyboardInterrupt


def terminates():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def runs_out():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("stop", "expected", "note"),
    [
        (interrupts, 130, "Stopped before everything was measured: interrupted"),
        (terminates, 143, "Stopped before everything was measured: interrupted"),
        (runs_out, 0, "Language model not timed further: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_what_has_been_measured_outlives_what_stops_the_rest(
    prox24, pretended, sparse_folder, tmp_path, stop, expected, note
):
    pretended["stops"] = stop
    words = ("--output", tmp_path / "out", "--sequences", 0, "--batches", "[1]", "--prefill", 16, "--generate", 0)
    code, printed, _ = prox24("bench", sparse_folder, *words)
    assert code == expected
    assert note in " ".join(printed.split())
    page = (tmp_path / "out" / "bench.md").read_text()
    assert note in page
    assert "| prefill | 1 x 16 | graph |" in page
    assert "decode | 1 x" not in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("stop", [None, interrupts, runs_out])
def test_rows_of_generate_are_written_one_by_one(prox24, pretended, sparse_folder, tmp_path, monkeypatch, stop):
    out = tmp_path / "out"

    def time_generation(models, batches, prompt, new, *, rounds, hosts, keep):
        keep(Generation("transformers, accelerate_generation", 1, prompt, new, 100.0, 130.0))
        assert "| transformers, accelerate_generation | 1 | 8 + 4 | 100 |" in (out / "bench.md").read_text()
        assert tuple(hosts) == ("accelerate_generation",)
        if stop:
            stop()

    monkeypatch.setattr(generation_rows, "time_generation", time_generation)
    words = ("--output", out, "--context", 8, "--generate", 4, "--sequences", 0, "--hosts", "[accelerate_generation]")
    code, printed, _ = prox24("bench", sparse_folder, *words)
    assert code == {None: 0, interrupts: 130, runs_out: 2}[stop]
    [row] = json.loads((out / "bench.json").read_text())["language"]["generation"]
    assert row["dense"] == 100
    assert ("Stopped before everything was measured" in printed) == (stop is not None)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [("[vllm]", "names vllm, which is not installed here"), ("[tgi]", "accelerate_generation.*transformers.*vllm")],
)
def test_programs_that_are_not_there_are_refused_first(prox24, pretended, hosts, message):
    code, _, err = prox24("bench", "nowhere", "--hosts", hosts)
    assert code == 2
    assert re.search(message, err, re.DOTALL), err


QUICK = ("--sequences", 2, "--length", 8, "--generate", 0)


@pytest.mark.parametrize(("weights", "form"), [("fp8_e4m3", "fp8_e4m3"), ("int8", "int8"), ("null", None)])
def test_a_form_of_8_bits_reaches_every_part(prox24, pretended, sparse_folder, tmp_path, monkeypatch, weights, form):
    monkeypatch.chdir(tmp_path)
    words = ("--weights", weights, "--max_error", 0.1, "--sequences", 0, "--generate", 4, "--rounds", 2)
    for _ in range(2):  # writes no file, so nothing is in the way of the second
        assert prox24("bench", sparse_folder, *words)[0] == 0
    assert not list(tmp_path.iterdir())
    assert (pretended["settings"].weights, pretended["settings"].max_error) == (form, 0.1)
    assert pretended["weights"] == form


def test_whole_calls_of_generate(prox24, pretended, sparse_folder, tmp_path, monkeypatch):
    """Both loops of transformers, and vLLM on the model dense and packed."""
    seen = {}

    def time_vllm(folders, serving):
        seen["serving"] = serving
        seen["files"] = {form: sorted(path.name for path in folder.iterdir()) for form, folder in folders.items()}
        return tuple(Generation("vLLM", batch, 8, 4, 100.0, 130.0) for batch in serving.batches)

    monkeypatch.setattr(generation_rows, "is_installed", lambda: True)
    monkeypatch.setattr(generation_rows, "time_vllm", time_vllm)
    out = tmp_path / "out"
    words = ("--output", out, "--batches", "[1, 2]", "--context", 8, "--generate", 4, "--rounds", 2, "--sequences", 0)
    code, *_ = prox24("bench", sparse_folder, *words)
    assert code == 0
    assert pretended["generated"] == pretended["names"]
    rows = json.loads((out / "bench.json").read_text())["language"]["generation"]
    assert [(row["host"], row["batch"], row["prompt"], row["new"]) for row in rows] == [
        (host, batch, 8, 4)
        for host in ("transformers, accelerate_generation", "transformers, static cache", "vLLM")
        for batch in (1, 2)
    ]
    assert all(row["dense"] > 0 and row["converted"] > 0 and not row["problem"] for row in rows)
    assert "| vLLM | 2 | 8 + 4 | 100 | 130 | 1.30 |" in (out / "bench.md").read_text()
    assert seen["serving"] == Serving("bfloat16", (1, 2), 8, 4, 2, 64)
    assert "model.safetensors" in seen["files"]["dense"]
    assert {"packed.safetensors", "config.json", "tokenizer.json"} <= set(seen["files"]["converted"])
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]


def test_generate_without_room_for_both_forms_is_a_note(prox24, pretended, sparse_folder, tmp_path):
    pretended["no room"] = True
    code, printed, _ = prox24("bench", sparse_folder, "--output", tmp_path / "out", "--sequences", 0)
    assert code == 0
    flat = " ".join(printed.split())
    assert "batch 8, not timed: both forms do not fit into memory together (OutOfMemoryError: CUDA out" in flat
    assert "vLLM is not installed here" in flat


def test_a_language_model_gives_tables_json_and_a_plot(prox24, pretended, sparse_folder, tmp_path):
    out = tmp_path / "out"
    words = ("--output", out, "--prefill", 16, "--context", 8, "--batches", "[1, 4]", "--token_counts", "[2]")
    code, printed, _ = prox24("bench", sparse_folder, *words, *QUICK)
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert pretended["workloads"] == [Workload("prefill", 1, 16), Workload("decode", 1, 8), Workload("decode", 4, 8)]
    assert pretended["settings"].token_counts == (2,)
    assert pretended["settings"].only_if_faster
    assert len(pretended["names"]) == 10
    assert pretended["text"].startswith("help topics of Python")
    stored = json.loads((out / "bench.json").read_text())
    assert stored["machine"]["model"] == str(sparse_folder)
    assert stored["limits"]["bytes_per_second"] == 4e12
    assert stored["scalars"]["convert/decode_4x8_tokens_per_second_converted"] == 8e5
    dense, converted = stored["language"]["variants"]
    assert dense["perplexity"] == converted["perplexity"] > 1
    page = (out / "bench.md").read_text()
    assert "| decode | 4 x 8 | graph | 0.010 | 0.005 | 2.00 | 400,000 | 800,000 |" in page
    assert "milliseconds a call" in " ".join(printed.split())
    assert str(out / "bench.png") in printed.replace("\n", "")


def test_perplexity_is_taken_on_a_text_of_the_users(prox24, pretended, sparse_folder, tmp_path):
    (tmp_path / "own.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17")
    code, *_ = prox24("bench", sparse_folder, "--output", tmp_path / "out", "--text", tmp_path / "own.txt", *QUICK)
    assert code == 0
    assert pretended["text"] == "own.txt, 2 x 8 tokens"


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (RuntimeError("device-side assert"), "RuntimeError: device-side assert"),  # positions that the model lacks
    ],
)
def test_a_language_model_that_fails_keeps_the_layers_table(prox24, pretended, sparse_folder, tmp_path, error, words):
    pretended["fails"] = error
    code, printed, _ = prox24("bench", sparse_folder, "--output", tmp_path / "out", "--sequences", 0)
    assert code == 0
    assert f"Language model not timed: {words}" in " ".join(printed.split())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]
    assert pretended["text"] is None


def test_where_nothing_wins_it_says_so(prox24, pretended, sparse_folder, tmp_path):
    pretended["wins"] = False
    code, printed, _ = prox24("bench", sparse_folder, "--output", tmp_path / "out", *QUICK)
    assert code == 0
    assert "No layer is as fast sparse at all of these numbers of tokens, so the model stays as it is" in " ".join(
        printed.split()
    )
    assert "names" not in pretended
    assert pretended["settings"].token_counts == (1, 8, 1024), "those of the workloads"


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)), (8, 3, 8, 8)),
        (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, max_position_embeddings=32)), (8, 32)),
        (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
            None,
        ),
    ],
    ids=["vision", "sequence classification", "encoder-decoder"],
)
def test_other_models_are_timed_as_a_whole_on_inputs_of_their_sizes(prox24, pretended, tmp_path, make, inputs):
    model = make()
    model.save_pretrained(tmp_path / "model")
    code, _, err = prox24("bench", tmp_path / "model", "--output", tmp_path / "out")
    assert code == 0, err
    assert "names" not in pretended
    if inputs is None:
        assert pretended["inputs"] is None
    else:
        [(_, given)] = pretended["inputs"].kwargs.items()
        assert tuple(given.shape) == inputs
        model.eval()(**pretended["inputs"].kwargs)


@pytest.mark.parametrize(
    ("own", "word", "expected"),
    [("float16", "auto", "float16"), ("float32", "auto", "bfloat16"), ("float32", "float16", "float16")],
)
def test_layers_run_in_the_dtype_of_the_model_or_the_one_that_is_named(own, word, expected):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=getattr(torch, own)), torch.nn.LayerNorm(8))
    assert layer_dtype(model, word) == getattr(torch, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "prefill=1024 is more than the 64 positions of the model (n_positions in its config): give --prefill 64 or",
        ),
        (
            ["--prefill", 64, "--context", 60, "--length", 8],
            "context=60 and generate=128 together are more than the 64",
        ),
    ],
)
def test_a_table_of_positions_is_not_read_past_its_end(prox24, pretended, tmp_path, words, message):
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64))
    model.save_pretrained(tmp_path / "model")
    code, _, err = prox24("bench", tmp_path / "model", *words)
    assert code == 2
    assert message in err
    assert "settings" not in pretended


def test_rotary_embeddings_beyond_the_positions_are_a_note(prox24, pretended, sparse_folder):
    words = ("--prefill", 100, "--context", 8, *QUICK)
    code, printed, _ = prox24("bench", sparse_folder, *words)
    assert code == 0
    flat = " ".join(printed.split())
    assert "100 tokens are more than the 64 positions of the model (max_position_embeddings): times hold" in flat
    code, printed, _ = prox24("bench", sparse_folder, "--prefill", 64, "--context", 8, *QUICK)
    assert "positions of the model" not in " ".join(printed.split())


def test_bare_weights_are_timed_layer_by_layer(prox24, pretended, sparse_folder, tmp_path):
    code, *_ = prox24(
        "bench", f"{sparse_folder}/model.safetensors", "--output", tmp_path / "out", "--convert_all", "true"
    )
    assert code == 0
    assert pretended["inputs"] is None
    assert pretended["settings"].token_counts == command.TOKEN_COUNTS
    assert not pretended["settings"].only_if_faster
    assert "names" not in pretended
