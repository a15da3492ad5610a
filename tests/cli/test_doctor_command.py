"""``prox24 doctor`` on everything that MODEL can be: its tables, its JSON, its exit codes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from prox24_lightning.cli import doctor as command
from prox24_lightning.convert import Target
from prox24_lightning.convert.autotune import disk_cache as disk_cache
from prox24_lightning.convert.autotune.kernel_table import KernelTimes
from prox24_lightning.mask import mask_24


def test_a_sparse_model(prox24, sparse_folder, tmp_path):
    code, out, _ = prox24("doctor", sparse_folder, "--json", tmp_path / "found.json", "--token_counts", "[1, 128]")
    assert code == 0
    flat = " ".join(out.split())
    assert "10 of 16 layers can run sparse: 72.7%" in flat
    assert "<= 1.78" in flat
    assert "<= 2.00" in flat
    assert "not measured here" in flat
    assert "No CUDA GPU here" in flat
    assert "Gains are those of kernels in CUDA graphs, as vLLM and" in flat
    found = json.loads((tmp_path / "found.json").read_text())
    states = {layer["name"]: layer["state"] for layer in found["layers"]}
    assert states["model.layers.0.self_attn.q_proj"] == "fits"
    assert states["model.layers.0.self_attn.k_proj"] == "dense"
    assert states["lm_head"] == "dense"
    assert found["token_counts"] == [1, 128]
    assert found["machine"]["model"] == str(sparse_folder)


def test_a_dense_model_has_nothing(prox24, dense_folder):
    code, out, _ = prox24("doctor", dense_folder)
    assert code == 1
    flat = " ".join(out.split())
    assert "0 of 16 layers can run sparse" in flat
    assert "Gain once pruned to 2:4" in flat
    assert "<= 1.78" in flat
    assert "fits once pruned" in flat
    assert "Once pruned, 10 layers run sparse on a suitable GPU: 72.7% of these weights." in flat
    assert out.splitlines()[-1] == f"next: prox24 prune {dense_folder} --text my.txt, or Prox24 in a training run"
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_a_dense_model_gains_what_was_measured_on_this_gpu(prox24, dense_folder, monkeypatch):
    monkeypatch.setattr(command, "find_target", lambda: Target("pretended H200", (9, 0), "cusparselt"))
    known = lambda verdict, tokens: 1.5 if tokens == 1 else None  # noqa: E731
    monkeypatch.setattr(command, "_known_gain", lambda *args: known)
    monkeypatch.setattr(command, "_known_form_gains", lambda *args: {"dense, float8": known})
    code, out, _ = prox24("doctor", dense_folder, "--token_counts", 1, 64, "--json", "-")
    assert code == 1
    found = json.loads(out)
    assert found["sparse_share"] == 0
    assert found["once_pruned"]["layers"] == 10
    assert found["once_pruned"]["expected"] == {
        "1": pytest.approx(1 / (1 - found["once_pruned"]["share"] / 3)),
        "64": None,
    }
    assert {layer["once_pruned"] for layer in found["layers"] if "q_proj" in layer["name"]} == {True}
    assert found["forms"] == {"dense, float8": found["once_pruned"]["expected"]}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("pretended H200", (9, 0), "cusparselt"), "next: prox24 bench {}"),
        (None, "next: prox24 convert {} OUT packs it; prox24 bench OUT times it on a GPU"),
        (Target("pretended P100", (6, 0), "cusparselt"), "next: nothing here runs sparse; the reasons stand above"),
    ],
)
def test_the_next_command_is_named(prox24, sparse_folder, monkeypatch, target, words):
    monkeypatch.setattr(command, "find_target", lambda: target)
    monkeypatch.setattr(command, "_known_gain", lambda *args: None)
    monkeypatch.setattr(command, "_known_form_gains", lambda *args: {})
    _, out, _ = prox24("doctor", sparse_folder)
    assert out.splitlines()[-1] == words.format(sparse_folder)


def test_a_packed_folder_is_not_to_be_packed_again(prox24, sparse_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_target", lambda: None)
    monkeypatch.setattr(command, "_known_form_gains", lambda *args: {})
    packed = tmp_path / "packed"
    assert prox24("convert", sparse_folder, packed)[0] == 0
    _, out, _ = prox24("doctor", packed)
    assert out.splitlines()[-1] == f"next: prox24 bench {packed} times it on a GPU"


def test_json_alone_on_stdout(prox24, sparse_folder):
    code, out, err = prox24("doctor", sparse_folder, "--json", "-")
    assert code == 0
    assert json.loads(out)["dtype"] == "bfloat16"
    assert "10 of 16 layers" in " ".join(err.split())


def test_the_folder_of_the_json_is_made_or_refused_first(prox24, dense_folder, monkeypatch, tmp_path):
    code, *_ = prox24("doctor", dense_folder, "--json", tmp_path / "new" / "found.json")
    assert code == 1
    assert json.loads((tmp_path / "new" / "found.json").read_text())["layers"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "load_source", lambda *args, **options: pytest.fail("loaded"))
    code, _, err = prox24("doctor", dense_folder, "--json", tmp_path / "file" / "found.json")
    assert code == 2
    assert "name another folder" in " ".join(err.split())


def test_a_gpu_that_cannot_is_exit_code_1(prox24, sparse_folder, monkeypatch):
    monkeypatch.setattr(command, "find_target", lambda: Target("pretended P100", (6, 0), "cusparselt"))
    code, out, _ = prox24("doctor", sparse_folder)
    assert code == 1
    assert "Nothing runs sparse on this machine: pretended P100" in " ".join(out.split())


def test_gains_come_from_what_was_measured_on_this_gpu(prox24, sparse_folder, monkeypatch, tmp_path):
    machine = disk_cache.Machine("pretended H200", "driver", "torch", "library", "kernels")
    gains = {(16, 16): 1.25, (32, 16): 0.5, (16, 32): 1.5}
    entries = {
        disk_cache.key(machine, torch.bfloat16, shape, tokens): KernelTimes(
            tokens, 10.0, {"cusparselt:1": 10.0 / gain, "expand": 99.0}
        )
        for shape, gain in gains.items()
        for tokens in (1, 64)
    }
    disk_cache.add(tmp_path / "kernels.json", entries)
    monkeypatch.setenv(disk_cache.PATH_VARIABLE, str(tmp_path / "kernels.json"))
    monkeypatch.setattr(disk_cache.Machine, "here", lambda device: machine)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "find_target", lambda: Target("pretended H200", (9, 0), "cusparselt"))
    code, out, _ = prox24("doctor", sparse_folder, "--json", "-", "--token_counts", "[1, 33, 256]")
    assert code == 0
    found = json.loads(out)
    gains = {layer["name"]: layer["expected"] for layer in found["layers"] if layer["state"] == "sparse"}
    assert gains["model.layers.0.self_attn.q_proj"] == {"1": 1.25, "33": 1.25, "256": None}, "33 goes by 64"
    assert gains["model.layers.1.mlp.up_proj"]["1"] == 0.5
    share = {"q": 2 * 2 * 256 / 5632, "up": 2 * 2 * 512 / 5632, "down": 2 * 512 / 5632}
    whole = 1 - share["q"] * 0.2 + share["up"] - share["down"] / 3
    assert found["expected"]["1"] == pytest.approx(1 / whole)
    assert found["expected"]["256"] is None
    assert found["forms"] == {
        form: {"1": None, "33": None, "256": None} for form in ("dense, float8", "2:4, fp8_e4m3", "2:4, int8")
    }


def test_dense_float8_and_packed_8_bits_have_rows_of_their_own(prox24, sparse_folder, monkeypatch, tmp_path):
    machine = disk_cache.Machine("pretended H200", "driver", "torch", "library", "kernels")
    entries = {
        disk_cache.key(machine, torch.bfloat16, shape, 16, "fp8_e4m3"): KernelTimes(
            16, 10.0, {"cusparselt:1": 4.0}, dense_fp8_us=5.0
        )
        for shape in ((16, 16), (8, 16), (32, 16), (16, 32))
    }
    disk_cache.add(tmp_path / "kernels.json", entries)
    monkeypatch.setenv(disk_cache.PATH_VARIABLE, str(tmp_path / "kernels.json"))
    monkeypatch.setattr(disk_cache.Machine, "here", lambda device: machine)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(command, "find_target", lambda: Target("pretended H200", (9, 0), "cusparselt"))
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = prox24("doctor", sparse_folder, "--json", str(tmp_path / "found.json"), "--token_counts", "[16, 64]")
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    up = next(layer for layer in found["layers"] if layer["name"] == "model.layers.1.mlp.up_proj")
    assert up["forms"] == {
        "dense, float8": {"16": 2.0, "64": None},
        "2:4, fp8_e4m3": {"16": 2.5, "64": None},
        "2:4, int8": {"16": None, "64": None},
    }
    assert "Gain in 8 bits" in out
    assert "dense, float8" in out
    assert "not measured" in out
    assert "Dense float8 needs no 2:4" in " ".join(out.split())


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["no_such_package", "--package", "true"], "no such package is installed"),
        (["SPARSE", "--token_counts", "[0]"], "must be whole numbers from 1 up"),
    ],
)
def test_errors_are_exit_code_2(prox24, sparse_folder, words, message):
    code, out, err = prox24("doctor", *(sparse_folder if word == "SPARSE" else word for word in words))
    assert code == 2
    assert err.startswith("prox24 doctor: ")
    assert message in err
    assert out == ""


def test_a_bug_is_exit_code_2_with_its_traceback(prox24, sparse_folder, monkeypatch):
    monkeypatch.setattr(command, "find_target", lambda: 1 / 0)
    code, _, err = prox24("doctor", sparse_folder)
    assert code == 2
    assert "ZeroDivisionError" in err
    assert "Traceback" in err


NET = """
import torch
from lightning.pytorch import LightningModule

class Net(LightningModule):
    def __init__(self, width: int = 32):
        super().__init__()
        self.body = torch.nn.Linear(width, 2 * width)
"""


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """What a run of LightningCLI leaves: config and checkpoint; the class lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doctored_net.py").write_text(NET)
    config = {"seed_everything": 1, "model": {"class_path": "doctored_net.Net", "init_args": {"width": 64}}}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    weight = torch.zeros(128, 64)
    weight[:, ::2] = 1.0
    state = {"body.weight": weight, "body.bias": torch.zeros(128)}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    torch.save(state, tmp_path / "bare.pt")
    save_file(state, tmp_path / "bare.safetensors")
    return tmp_path


def shown(prox24, *words):
    code, out, err = prox24("doctor", *words, "--json", "-")
    assert code in (0, 1), err
    found = json.loads(out)
    return code, found["machine"]["model"], {layer["name"]: layer["why"] for layer in found["layers"]}


def test_a_checkpoint_with_the_config_of_its_run(prox24, run_folder):
    found = shown(prox24, "run/checkpoints/last.ckpt", "--run_config", "run/config.yaml")
    assert found == (0, "run/checkpoints/last.ckpt with run/config.yaml", {"body": "no CUDA GPU in use"})


def test_no_class_is_made_that_only_lies_beside_a_checkpoint(prox24, run_folder):
    (run_folder / "doctored_net.py").write_text("raise SystemExit('a stranger was run')")
    code, about, layers = shown(prox24, "run/checkpoints/last.ckpt")
    assert (code, layers) == (0, {"body": "no CUDA GPU in use"})
    assert about.endswith("(for the model itself: --run_config run/config.yaml)")


def test_a_config_alone_is_the_untrained_model(prox24, run_folder):
    code, about, layers = shown(prox24, "run/config.yaml")
    assert (code, about) == (1, "run/config.yaml, untrained")
    assert layers["body"].startswith("not 2:4: no group is")


@pytest.mark.parametrize("name", ["bare.pt", "bare.safetensors"])
def test_weights_alone_are_a_list_of_layers(prox24, run_folder, name):
    assert shown(prox24, name) == (0, f"weights of {name}", {"body": "no CUDA GPU in use"})


def test_a_checkpoint_of_another_model_is_refused(prox24, run_folder):
    config = yaml.safe_load((run_folder / "run/config.yaml").read_text())
    config["model"]["init_args"]["width"] = 32
    (run_folder / "other.yaml").write_text(yaml.safe_dump(config))
    code, _, err = prox24("doctor", "bare.pt", "--run_config", "other.yaml")
    assert code == 2
    assert "bare.pt does not fit the model of other.yaml" in err


def test_a_model_that_lacks_weights_is_refused(prox24, sparse_folder, tmp_path):
    folder = shutil.copytree(sparse_folder, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, err = prox24("doctor", folder)
    assert code == 2
    assert out == ""
    assert "lacks 1 tensors of LlamaForCausalLM, model.layers.1.mlp.up_proj.weight: its files belong to another" in err
    assert "now --head auto" in err


@pytest.mark.parametrize("content, message", [([1, 2], "holds no state dict"), (print, "holds more than plain data")])
def test_files_that_hold_no_weights(prox24, tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    code, _, err = prox24("doctor", tmp_path / "x.pt")
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainer: {max_steps: 3}", "has no entry 'model'"),
        ("model: [", ": not YAML: expected the node content"),
        ("model: {class_path: no.such.Class}", "the entry 'model' of .*x.yaml makes no module: .*no.such.Class"),
    ],
)
def test_a_config_without_a_model(prox24, tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    code, _, err = prox24("doctor", tmp_path / "x.yaml")
    assert code == 2
    assert re.match(f"prox24 doctor: .*{message}", err)
    assert len(err.splitlines()) == 1


def test_a_folder_with_a_file_cut_short(prox24, sparse_folder, tmp_path):
    folder = shutil.copytree(sparse_folder, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = prox24("doctor", folder)
    assert code == 2
    assert f"prox24 doctor: a weights file of {folder} is damaged or cut short, fetch it again: " in err
    assert "Traceback" not in err


def test_weights_of_8_bits(prox24, tmp_path):
    weight = torch.randn(64, 64)
    state = {"a.weight": weight * mask_24(weight), "b.weight": weight}
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, tmp_path / "x.safetensors")
    code, _, layers = shown(prox24, tmp_path / "x.safetensors")
    assert (code, layers["a"]) == (0, "no CUDA GPU in use")
    assert layers["b"].startswith("not 2:4: ")
