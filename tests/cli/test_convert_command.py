"""``prox24 convert``: packed and back, what it writes, and what it refuses."""

from __future__ import annotations

import importlib
import json
import re
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_language import Chains

from prox24_lightning import register_with_transformers
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.cli import convert
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.convert.packed_model import Packable
from prox24_lightning.io import packed_folder
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.sources import load_source
from prox24_lightning.io.texts import token_sequences
from prox24_lightning.mask import mask_24


def same_state(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_there_and_back(prox24, sparse_folder, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    code, out, _ = prox24("convert", sparse_folder, packed)
    assert code == 0
    flat = " ".join(out.split())
    assert "14 weights packed and read back equal; 1 weight stored dense. model.embed_tokens.weight: embedding" in flat
    file = PackedFile(packed / "packed.safetensors")
    assert f"{file.dense_bytes:,} bytes dense, {file.stored_bytes:,} bytes packed" in flat
    assert f"next: prox24 bench {packed} on a GPU" in flat
    assert {"config.json", "packed.safetensors", "README.md", "tokenizer.json"} <= {p.name for p in packed.iterdir()}
    card = (packed / "README.md").read_text()
    assert "14 weights as two values" in card
    for module, name in re.findall(r"`(prox24_lightning[\w.]*)\.(\w+)`", card):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name} of the card is not there"
    code, *_ = prox24("convert", packed, dense, "--form", "dense")
    assert code == 0
    models = [hf.AutoModelForCausalLM.from_pretrained(folder) for folder in (sparse_folder, dense)]
    assert same_state(*(model.state_dict() for model in models))
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))
    assert hf.AutoTokenizer.from_pretrained(dense).decode([2, 3]) == "w0 w1"


def test_a_packed_folder_is_a_model_to_every_command(prox24, sparse_folder, tmp_path):
    prox24("convert", sparse_folder, tmp_path / "packed")
    found = []
    for folder in (sparse_folder, tmp_path / "packed"):
        code, out, _ = prox24("doctor", folder, "--json", "-")
        assert code == 0
        found.append(json.loads(out)["layers"])
    assert found[0] == found[1]


def test_a_packed_folder_of_an_own_module_is_one_too(prox24, tmp_path):
    weight = torch.randn(16, 32)
    torch.save({"layer.weight": weight * mask_24(weight)}, tmp_path / "own.pt")
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert prox24("convert", tmp_path / "own.pt", packed)[0] == 0
    assert not (packed / "config.json").exists()
    for name in (packed, packed / "packed.safetensors"):
        code, out, _ = prox24("doctor", name)
        assert code == 0
        assert f"next: prox24 bench {name} times it" in " ".join(out.split())
    assert prox24("convert", packed, back, "--form", "dense")[0] == 0
    assert torch.equal(
        load_source(str(back / "model.safetensors")).model.state_dict()["layer.weight"], weight * mask_24(weight)
    )


def test_dense_weights_take_the_place_of_packed_ones_and_never_the_other_way_round(prox24, sparse_folder, tmp_path):
    folder = tmp_path / "model"
    assert prox24("convert", sparse_folder, folder)[0] == 0
    code, _, err = prox24("convert", sparse_folder, folder)
    assert code == 2
    assert f"{folder} exists and holds README.md and " in err
    assert "--overwrite" in err
    assert prox24("convert", sparse_folder, folder, "--overwrite", "true")[0] == 0, "packed again"
    shutil.copy(folder / "packed.safetensors", tmp_path / "kept.safetensors")
    assert prox24("convert", folder, folder, "--form", "dense", "--overwrite", "true")[0] == 0
    assert not (folder / "packed.safetensors").exists()
    assert same_state(*(load_file(f"{one}/model.safetensors") for one in (folder, sparse_folder)))
    code, _, err = prox24("convert", "nowhere", folder)
    assert code == 2
    assert f"{folder} holds dense weights (model.safetensors), and packed.safetensors beside them is a second" in err
    shutil.copy(tmp_path / "kept.safetensors", folder / "packed.safetensors")
    for dense in ("model.safetensors", "pytorch_model.bin"):
        code, _, err = prox24("doctor", folder)
        assert code == 2
        assert f"({dense})" in err
        assert "remove one of the two" in err
        (folder / "pytorch_model.bin").touch()
        (folder / "model.safetensors").unlink(missing_ok=True)


def test_a_folder_that_lacks_a_part_says_which(prox24, sparse_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="packed.safetensors"):
        packed_folder.load_folder(sparse_folder, hf.AutoModelForCausalLM)
    folder = tmp_path / "packed"
    prox24("convert", sparse_folder, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="but no config.json"):
        packed_folder.load_folder(folder, hf.AutoModelForCausalLM)
    (folder / "config.json").write_text(config)
    write_packed(folder / "packed.safetensors", {"steps": torch.tensor(1)}, {})
    with pytest.raises(ValueError, match="holds no floating-point tensor"):
        packed_folder.load_folder(folder, hf.AutoModelForCausalLM)


def test_weights_are_cast_when_asked(prox24, sparse_folder, tmp_path):
    code, *_ = prox24("convert", sparse_folder, tmp_path / "packed", "--dtype", "bfloat16")
    assert code == 0
    file = PackedFile(tmp_path / "packed" / "packed.safetensors")
    assert {file.dtype(name) for name in file.names} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["fp8_e4m3", "int8"])
def test_rounded_weights(prox24, sparse_folder, tmp_path, form):
    code, out, _ = prox24("convert", sparse_folder, tmp_path / "packed", "--weights", form, "--dtype", "bfloat16")
    assert code == 0
    assert f"14 weights rounded to {form}, packed and read back equal" in " ".join(out.split())
    file = PackedFile(tmp_path / "packed" / "packed.safetensors")
    assert {entry.form for entry in file.packed.values()} == {form}
    assert {file.dtype(name) for name in file.names} == {torch.bfloat16}
    # Dense and back: the same bytes.
    assert prox24("convert", tmp_path / "packed", tmp_path / "dense", "--form", "dense")[0] == 0
    assert prox24("convert", tmp_path / "dense", tmp_path / "again", "--weights", form)[0] == 0
    again = PackedFile(tmp_path / "again" / "packed.safetensors")
    assert same_state(again.state_dict(), file.state_dict())
    assert all(torch.equal(again.read_packed(n).scales, file.read_packed(n).scales) for n in file.packed)


def test_calibration_text_lets_entries_make_up_for_each_other(prox24, sparse_folder, tmp_path):
    calibrate = ("--data", "tiny_language.Chains", "--sequences", 32, "--length", 16, "--device", "cpu")
    for folder, more in (("plain", ()), ("calibrated", calibrate)):
        assert prox24("convert", sparse_folder, tmp_path / folder, "--weights", "fp8_e4m3", *more)[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(sparse_folder)
    found = [packed_folder.load_folder(tmp_path / name, hf.AutoModelForCausalLM) for name in ("plain", "calibrated")]
    ids = token_sequences(hf.AutoTokenizer.from_pretrained(sparse_folder), Chains().texts("evaluation"), 8, 16)
    expected = model(ids).logits.detach()

    def error(folder):
        found = packed_folder.load_folder(tmp_path / folder, hf.AutoModelForCausalLM)
        layers = [layer for layer in found.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad(), rounded_inputs(layers, "fp8_e4m3"):
            return float((found(ids).logits - expected).square().sum())

    errors = [error("plain"), error("calibrated")]
    assert errors[1] < errors[0]
    assert not same_state(found[0].state_dict(), found[1].state_dict())
    code, _, err = prox24("convert", sparse_folder, tmp_path / "wide", *calibrate)
    assert (code, "--text and --data are for rounded weights" in err) == (2, True)
    (tmp_path / "my.txt").write_text("\n\n".join(Chains().texts("calibration")))
    own = ("--text", tmp_path / "my.txt", *calibrate[2:])
    assert (
        prox24("convert", sparse_folder, tmp_path / "own", "--weights", "fp8_e4m3", "--input_quantile", 1, *own)[0] == 0
    )
    scales = {
        name: entry.input_scale for name, entry in PackedFile(tmp_path / "own" / "packed.safetensors").packed.items()
    }
    config = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 3
    assert {f"{name}.weight": scale for name, scale in config["input_scales"].items()} == scales
    register_with_transformers()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "own" / "config.json").read_text()
    code, _, err = prox24("convert", sparse_folder, tmp_path / "none", "--weights", "int8", "--input_quantile", 1)
    assert (code, "--input_quantile takes rounded weights and calibration text" in err) == (2, True)
    late = ("--weights", "int8", "--input_quantile", 1.5, *own)
    code, _, err = prox24("convert", tmp_path / "not_read", tmp_path / "none", *late)
    assert (code, "input_quantile=1.5 must lie in (0, 1]" in err) == (2, True)
    assert error("own") < errors[0]
    code, _, err = prox24("convert", sparse_folder, tmp_path / "both", "--weights", "int8", *own, *calibrate[:2])
    assert (code, "name one source of text" in err) == (2, True)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--weights", "fp8_e4m3", "--form", "dense"), "--form dense packs none"),
        (("--weights", "bfloat16"), "'fp8_e4m3', 'int8'"),
    ],
)
def test_forms_that_cannot_be_used(prox24, sparse_folder, tmp_path, options, words):
    code, _, err = prox24("convert", sparse_folder, tmp_path / "packed", *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "packed").exists()


def test_a_row_that_cannot_be_rounded_is_named(prox24, sparse_folder, tmp_path):
    shutil.copytree(sparse_folder, tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 0:4] = torch.tensor([float("inf"), 0, 0, 0])
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = prox24("convert", tmp_path / "model", tmp_path / "packed", "--weights", "int8")
    assert code == 2
    assert "model.layers.1.mlp.up_proj.weight: row 3 holds NaN, inf" in err


BUFFERED = {
    "llama": hf.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    ),
    "gptj": hf.GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=64, rotary_dim=4, n_positions=256),
    "xglm": hf.XGLMConfig(d_model=16, ffn_dim=32, num_layers=1, attention_heads=2, vocab_size=64),
}


@pytest.mark.parametrize("family", BUFFERED)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tables_of_positions_are_as_from_pretrained_makes_them(tmp_path, family, stored):
    model = hf.AutoModelForCausalLM.from_config(BUFFERED[family], dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "dense")
    dense = Pretrained(str(tmp_path / "dense"), dtype="bfloat16").model()
    packed_folder.save_folder(tmp_path / "packed", model, Packable({}, {}), source="a test")
    packed = Pretrained(str(tmp_path / "packed"), dtype="bfloat16").model()
    found, expected = (dict(one.named_buffers()) for one in (packed, dense))
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert same_state(packed.state_dict(), dense.state_dict())


def test_targets_and_skip(prox24, sparse_folder, tmp_path):
    code, *_ = prox24(
        "convert", sparse_folder, tmp_path / "p", "--targets", '["*.mlp.*"]', "--skip", '["*.1.mlp.up_proj"]'
    )
    assert code == 0
    packed = PackedFile(tmp_path / "p" / "packed.safetensors").packed
    assert sorted(name.removeprefix("model.layers.") for name in packed) == [
        f"{block}.mlp.{part}_proj.weight"
        for block in (0, 1)
        for part in ("down", "gate", "up")
        if (block, part) != (1, "up")
    ]


def test_bare_weights_there_and_back(prox24, tmp_path):
    weight = torch.randn(8, 16)
    weight.view(8, 4, 4)[..., 1:3] = 0
    state = {
        "up.weight": weight,
        "up.bias": torch.ones(8),
        "up.adapter.weight": torch.randn(4, 8),
        "norm.weight": torch.ones(16),
        "norm.count": torch.tensor(3),
        "places": torch.randn(5, 8),
    }
    save_file(state, tmp_path / "bare.safetensors")
    assert prox24("convert", tmp_path / "bare.safetensors", tmp_path / "packed")[0] == 0
    assert [p.name for p in sorted((tmp_path / "packed").iterdir())] == ["README.md", "packed.safetensors"]
    again = prox24("convert", tmp_path / "packed" / "packed.safetensors", tmp_path / "dense", "--form", "dense")
    assert again[0] == 0
    assert same_state(load_file(tmp_path / "dense" / "model.safetensors"), state)


def test_the_card_of_bare_weights_names_calls_that_work(prox24, tmp_path, monkeypatch):
    weight = torch.ones(8, 16)
    weight.view(8, 4, 4)[..., 1:3] = 0
    save_file({"up.weight": weight}, tmp_path / "bare.safetensors")
    assert prox24("convert", tmp_path / "bare.safetensors", tmp_path / "packed")[0] == 0
    card = (tmp_path / "packed" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "packed")
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(16, 8, bias=False)})
    exec(card.split("```python\n")[1].split("```")[0], {"model": model})
    assert torch.equal(model["up"].weight, weight)
    assert "stored dense" not in card
    (words,) = re.findall(r"`prox24 (convert [^`]*)`", card)
    words = words.replace("THIS_FOLDER", str(tmp_path / "packed")).replace("OUT", str(tmp_path / "dense"))
    assert prox24(*words.split())[0] == 0
    assert same_state(load_file(tmp_path / "dense" / "model.safetensors"), {"up.weight": weight})


def test_a_weight_with_nan_is_refused_by_name(prox24, tmp_path):
    weight = torch.ones(8, 16)
    weight.view(8, 4, 4)[..., 1:3] = 0
    weight[2, 4] = torch.nan
    save_file({"up.weight": weight}, tmp_path / "bare.safetensors")
    code, _, err = prox24("convert", tmp_path / "bare.safetensors", tmp_path / "packed")
    assert code == 2
    assert err.startswith("prox24 convert: up.weight holds NaN, so the model is damaged")
    assert list((tmp_path / "packed").iterdir()) == []


class NotSerializable:
    """What transformers leaves on a model that it has de-quantized from a GGUF file."""

    def is_serializable(self):
        return False


def test_a_model_of_a_gguf_file_is_written_dense(prox24, sparse_folder, tmp_path, monkeypatch):
    source = load_source(sparse_folder)
    source.model.config.quantization_config = {"quant_method": "gguf"}
    source.model.hf_quantizer = NotSerializable()
    monkeypatch.setattr(convert, "load_source", lambda name, **_: source)
    assert prox24("convert", sparse_folder, tmp_path / "dense", "--form", "dense")[0] == 0
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_bare_weights_that_are_tied_are_one_tensor(prox24, tmp_path):
    weight = torch.ones(8, 16)
    weight.view(8, 4, 4)[..., 1:3] = 0
    torch.save({"one.weight": weight, "other.weight": weight.detach()}, tmp_path / "bare.pt")
    assert prox24("convert", tmp_path / "bare.pt", tmp_path / "packed")[0] == 0
    file = PackedFile(tmp_path / "packed" / "packed.safetensors")
    assert file.names == ("one.weight", "other.weight")
    assert list(file.packed) == ["one.weight"]
    assert torch.equal(file.read("other.weight"), weight)


@pytest.mark.parametrize(("name", "content"), [("a.pt", b""), ("a.ckpt", b"hello"), ("a.safetensors", b"hello")])
def test_a_file_that_is_no_model_is_refused_in_one_line(prox24, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    code, _, err = prox24("convert", tmp_path / name, tmp_path / "packed")
    assert code == 2
    assert err.startswith(f"prox24 convert: {tmp_path / name} is damaged or no ")
    assert "Traceback" not in err


def test_a_folder_without_a_tokenizer_gets_none(prox24, tmp_path):
    """For GPT-2 transformers would make an empty one from the config alone, and it would be saved along."""
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    with torch.no_grad():
        weight = model.transformer.h[0].mlp.c_fc.weight
        weight.mul_(mask_24(weight, dim=0))
    model.save_pretrained(tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    assert source.tokenizer is None
    with pytest.raises(ValueError, match=r"model holds no file of a tokenizer \(tokenizer\*, vocab"):
        source.pretrained.tokenizer()
    assert prox24("convert", tmp_path / "model", tmp_path / "packed")[0] == 0
    assert not list((tmp_path / "packed").glob("*token*"))


def test_a_dense_model_is_refused_and_leaves_nothing(prox24, dense_folder, tmp_path):
    code, out, err = prox24("convert", dense_folder, tmp_path / "packed")
    assert code == 2
    assert out == ""
    assert "so nothing would be packed: model.embed_tokens.weight: embedding; model.layers.*" in err
    assert not (tmp_path / "packed").exists()


def test_a_damaged_layer_is_refused_by_name(prox24, sparse_folder, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(sparse_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 4:7] = 0.5
    model.save_pretrained(tmp_path / "damaged")
    code, _, err = prox24("convert", tmp_path / "damaged", tmp_path / "packed")
    assert code == 2
    assert "model.layers.1.mlp.up_proj.weight is not 2:4, though most of it is: 1 of 128 groups" in err
    assert "(at (2, 4): 0.5, 0.5, 0.5" in err
    assert not (tmp_path / "packed").exists()


def test_what_does_not_read_back_is_not_kept(prox24, sparse_folder, tmp_path, monkeypatch):
    class Wrong(PackedFile):
        def read(self, name, device="cpu"):
            return super().read(name, device) + 1

    monkeypatch.setattr("prox24_lightning.convert.format.shards.PackedFile", Wrong)
    code, _, err = prox24("convert", sparse_folder, tmp_path / "packed")
    assert code == 2
    assert "differs from the model's" in err
    assert list((tmp_path / "packed").iterdir()) == []


def test_layers_that_keep_16_bits(prox24, sparse_folder, tmp_path):
    calibrate = ("--data", "tiny_language.Chains", "--sequences", 16, "--length", 16, "--device", "cpu")
    named = ("--weights", "int8", "--keep_16bit", '["*.q_proj"]')
    code, out, _ = prox24("convert", sparse_folder, tmp_path / "named", *named)
    assert code == 0
    assert "14 weights rounded to int8 but 6, packed" in " ".join(out.split())
    config = json.loads((tmp_path / "named" / "config.json").read_text())["quantization_config"]
    # Servers run queries, keys and values as one layer.
    assert config["modules_not_rounded"] == sorted(
        f"model.layers.{layer}.self_attn.{key}_proj" for layer in range(2) for key in "qkv"
    )
    bound = ("--weights", "int8", *calibrate, "--max_loss_rise", "1e-12", "--smooth", "false", "--tune_steps", 2)
    code, out, _ = prox24("convert", sparse_folder, tmp_path / "bound", *bound)
    assert code == 0
    assert "tuned" in out
    config = json.loads((tmp_path / "bound" / "config.json").read_text())["quantization_config"]
    kept = config["modules_not_rounded"]
    assert f"with {len(kept)} of 14 in 16 bits" in " ".join(out.split())
    model = hf.AutoModelForCausalLM.from_pretrained(sparse_folder)
    again = packed_folder.load_folder(tmp_path / "bound", hf.AutoModelForCausalLM)
    assert len(kept) > 7
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, again.get_submodule(name).weight)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--weights", "int8", "--max_loss_rise", "0.01"),
            "--max_loss_rise takes rounded weights and calibration text",
        ),
        (("--weights", "int8", "--smooth", "true"), "--smooth takes rounded weights and calibration text"),
        (("--weights", "int8", "--tune_steps", "2"), "--tune_steps takes rounded weights and calibration text"),
        (("--keep_16bit", '["*.q_proj"]'), "--keep_16bit is for rounded weights"),
        (("--weights", "int8", "--keep_16bit", '["*.k_porj"]'), "keep_16bit='*.k_porj' matches no layer"),
    ],
)
def test_bounds_and_patterns_that_cannot_be_used(prox24, sparse_folder, tmp_path, options, words):
    code, _, err = prox24("convert", sparse_folder, tmp_path / "out", *options)
    assert (code, words in err) == (2, True)


def test_weights_left_out_by_a_pattern_are_counted_behind_it(prox24, sparse_folder, tmp_path):
    code, printed, _ = prox24("convert", sparse_folder, tmp_path / "p", "--skip", "*.mlp.*")
    assert code == 0
    flat = " ".join(printed.split())
    assert "skip='*.mlp.*': 6 weights" in flat
    assert "mlp.up_proj" not in flat


def test_a_pickled_module_is_refused_with_its_class(prox24, tmp_path):
    torch.save({"state_dict": torch.nn.Bilinear(2, 2, 2)}, tmp_path / "whole.pt")
    code, _, err = prox24("convert", tmp_path / "whole.pt", tmp_path / "out")
    assert code == 2
    assert "whole.pt holds more than plain data (torch.nn.modules.linear.Bilinear), and loading that could run" in err
    assert "weights_only" not in err
