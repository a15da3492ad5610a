"""Models of any kind, by the class that their own config names: doctor, convert there and back, and the card's call."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from tiny_language import tiny_tokenizer

from prox24_lightning.mask import mask_24
from prox24_lightning.weights.selection import select_weights

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PROCESSOR = json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}})
MODELS = {
    "sequence classification": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, vocab_size=64, num_labels=5)
    ),
    "encoder": lambda: hf.BertModel(hf.BertConfig(**SIZES, vocab_size=64)),
    "masked language model": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, vocab_size=64)),
    "vision": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "sound": lambda: hf.ASTForAudioClassification(
        hf.ASTConfig(**SIZES, num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8)
    ),
    "encoder-decoder": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    ),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for weight in select_weights(model):
            weight.parameter.mul_(mask_24(weight.parameter, dim=weight.dim))
    model.save_pretrained(tmp_path / "model")
    if request.param == "vision":
        (tmp_path / "model" / "preprocessor_config.json").write_text(PROCESSOR)
    return tmp_path / "model"


def test_there_and_back(prox24, folder, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    code, out, _ = prox24("doctor", folder, "--json", "-")
    assert code == 0
    code, _, err = prox24("convert", folder, packed)
    assert code == 0, err
    assert json.loads(prox24("doctor", packed, "--json", "-")[1])["layers"] == json.loads(out)["layers"]
    assert prox24("convert", packed, dense, "--form", "dense")[0] == 0
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    before, after = (getattr(hf, kind).from_pretrained(one).state_dict() for one in (folder, dense))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for one in (packed, dense):
        assert (one / "preprocessor_config.json").exists() == (folder / "preprocessor_config.json").exists()
        assert not list(one.glob("*token*"))


def test_the_call_of_the_card_runs_as_it_stands(prox24, folder, tmp_path, monkeypatch):
    assert prox24("convert", folder, tmp_path / "packed")[0] == 0
    monkeypatch.chdir(tmp_path / "packed")
    found = {}
    exec((tmp_path / "packed" / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    assert [type(found["model"]).__name__] == json.loads((folder / "config.json").read_text())["architectures"]


def test_an_encoder_has_no_perplexity(prox24, tmp_path):
    MODELS["encoder"]().save_pretrained(tmp_path / "model")
    (tmp_path / "own.txt").write_text("\n\n".join(f"w{number} w{number + 1}" for number in range(50)))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ("--model.name", tmp_path / "model", "--text", tmp_path / "own.txt", "--output", tmp_path / "out")
    code, _, err = prox24("prune", *words, "--sequences", 2, "--length", 8, "--eval_sequences", 1)
    assert code == 2
    assert "a BertModel has no next-token perplexity: add --eval_sequences 0" in err
    assert not (tmp_path / "out").exists()
