"""Errors of a model's name come at once: no request to the hub, no weights read."""

from __future__ import annotations

import pytest
import transformers
from tiny_language import save_tiny_llama

from prox24_lightning.io.pretrained import Pretrained


@pytest.fixture
def no_hub(monkeypatch):
    """Every call that could ask the hub fails the test."""

    def asked(*args, **kwargs):
        pytest.fail("transformers was asked")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", asked)


@pytest.mark.parametrize("name", ["./pruned", "/no/such/folder", "~/pruned", "runs/mine/pruned", "pruned/"])
def test_a_folder_that_does_not_exist_is_refused_without_the_hub(no_hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}; check the path"):
        Pretrained(name).load()


def test_a_mistyped_folder_gets_the_nearest_name(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pruned").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no folder runs/prund; did you mean runs/pruned\?"):
        Pretrained("runs/prund").tokenizer()


def test_a_file_is_no_model(no_hub, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"model\.onnx is a file of an unknown kind"):
        Pretrained(str(tmp_path / "model.onnx")).model()


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3-8B"])
def test_names_of_the_hub_reach_transformers(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt3").mkdir()
    asked = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda source, **options: asked.append(source))
    Pretrained(name).tokenizer()
    assert asked == [name]


def test_a_folder_loads(tmp_path):
    model, [tokenizer] = Pretrained(save_tiny_llama(tmp_path)).load()
    assert not model.training
    assert tokenizer.decode([2, 3]) == "w0 w1"
