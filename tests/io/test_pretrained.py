"""Errors of a model's name come at once: no request to the hub, no weights read."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from tiny_language import save_tiny_llama

from prox24_lightning.convert.packed_model import Packable
from prox24_lightning.io.packed_folder import save_folder
from prox24_lightning.io.pretrained import Pretrained


@pytest.fixture
def no_hub(monkeypatch):
    """Every call that could ask the hub fails the test."""

    def asked(*args, **kwargs):
        pytest.fail("transformers was asked")

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(hf, name), "from_pretrained", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The hub's cache lies in ``tmp_path``, and no request leaves."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


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
def test_a_name_that_the_cache_lacks_is_refused_without_the_hub(no_hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and the cache holds no model {name} of the hub"):
        Pretrained(name).load()
    with pytest.raises(
        FileNotFoundError, match=f"{name} at v2 of the hub: check the name, or fetch it with --download"
    ):
        Pretrained(name, revision="v2").tokenizer()


def in_cache(root, name, revision, model, commit):
    """Save a model into the cache as huggingface_hub lays it out."""
    repo = root / f"models--{name.replace('/', '--')}"
    model.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    return repo / "snapshots" / commit


def tiny_bert(labels):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=64, num_labels=labels))


def test_revisions_of_the_cache_load_by_their_own_class(no_network, tmp_path):
    one = in_cache(tmp_path, "me/classifier", "main", tiny_bert(2), "0" * 40)
    other = in_cache(tmp_path, "me/classifier", "v1", tiny_bert(5), "1" * 40)
    model = Pretrained("me/classifier").model()
    assert type(model) is hf.BertForSequenceClassification
    assert model.config.num_labels == 2
    assert Pretrained("me/classifier").folder() == one
    named = Pretrained("me/classifier", revision="v1")
    assert named.folder() == other
    assert named.model().config.num_labels == 5
    assert named.describe() == "me/classifier, revision v1, float32"


def test_a_packed_model_of_the_cache(no_network, tmp_path):
    model = tiny_bert(2)
    folder = in_cache(tmp_path, "me/packed", "main", model, "0" * 40)
    (folder / "model.safetensors").unlink()
    save_folder(folder, model, Packable({}, {}), source="a test")
    loaded = Pretrained("me/packed").model()
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_model_that_is_in_the_cache_in_part_names_what_is_missing(no_network, tmp_path):
    folder = in_cache(tmp_path, "me/half", "main", tiny_bert(2), "0" * 40)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"in part only \(model-00002-of-00002\.safetensors is missing\)"):
        Pretrained("me/half").model()


def test_the_hub_is_asked_only_for_a_download(no_network, tmp_path, monkeypatch):
    asked = []
    folder = in_cache(tmp_path, "me/classifier", "main", tiny_bert(2), "0" * 40)

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Pretrained("me/classifier").model()
    assert asked == []
    Pretrained("me/classifier", revision="v3", download=True).model()
    assert {(name, revision) for name, revision, _ in asked} == {("me/classifier", "v3")}
    assert "model*.safetensors" in asked[0][2]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    Pretrained("me/classifier", download=True).folder()
    assert asked[-1][2] == ("pytorch_model*.bin",)


def test_a_download_that_fails_gives_the_hubs_reason(no_network, monkeypatch):
    def snapshot_download(name, **options):
        raise RuntimeError("401 Client Error.\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(OSError, match=r"me/secret was not fetched from the hub: 401 Client Error\.$"):
        Pretrained("me/secret", download=True).model()


@pytest.mark.parametrize(("names", "said"), [(None, "no architecture"), (["NetOfTomorrow"], "NetOfTomorrow")])
def test_a_config_without_a_known_class_asks_for_the_head(tmp_path, names, said):
    model = tiny_bert(2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
    with pytest.raises(ValueError, match=f"names {said}, which transformers .* name the auto class"):
        Pretrained(str(tmp_path)).model()
    assert type(Pretrained(str(tmp_path), head="base").model()) is hf.BertModel


def test_a_folder_loads(tmp_path):
    model, [tokenizer] = Pretrained(save_tiny_llama(tmp_path)).load()
    assert not model.training
    assert tokenizer.decode([2, 3]) == "w0 w1"


class NotSerializable:
    """What transformers leaves on a model that it has de-quantized from a GGUF file."""

    def is_serializable(self):
        return False


def test_a_model_of_a_gguf_file_can_be_saved(tmp_path, monkeypatch):
    save_tiny_llama(tmp_path)
    load = hf.AutoModelForCausalLM.from_pretrained

    def from_gguf(source, *, gguf_file, **options):
        model, found = load(source, **options)
        model.hf_quantizer = NotSerializable()
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, found

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", from_gguf)
    model = Pretrained(str(tmp_path), file="model.gguf", head="causal_lm").model()
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
