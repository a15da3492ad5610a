"""Packed folders through transformers' own ``from_pretrained``, ``generate``, ``pipeline`` and ``save_pretrained``."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from tiny_language import tiny_tokenizer

import prox24_lightning
from prox24_lightning.convert import SemiStructuredLinear, find_packable, load_packed, open_packed
from prox24_lightning.convert.convert import insert_layers
from prox24_lightning.convert.kernels.packed_buffer import pack_buffer
from prox24_lightning.integrations.transformers.quantizer import Prox24Config
from prox24_lightning.io.packed_folder import load_folder, save_folder, write_folder
from prox24_lightning.mask import mask_24
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.oneshot.save import save_pruned
from prox24_lightning.utils.checksum import tensor_bytes
from prox24_lightning.weights.layer_matrix import transposed_kind
from prox24_lightning.weights.rounding import round_weight
from prox24_lightning.weights.selection import select_weights

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
BERT = {
    k: LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
}
VIT = {**{k: BERT[k] for k in BERT if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
IDS = torch.arange(3, 12).unsqueeze(0)
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

FAMILIES = {
    "llama": (hf.AutoModelForCausalLM, lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), IDS),
    "tied": (
        hf.AutoModelForCausalLM,
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        IDS,
    ),
    "experts": (
        hf.AutoModelForCausalLM,
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4)),
        IDS,
    ),
    "transposed experts": (
        hf.AutoModelForCausalLM,
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
        IDS,
    ),
    "gpt2": (hf.AutoModelForCausalLM, lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), IDS),
    "bert": (
        hf.AutoModelForSequenceClassification,
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        IDS,
    ),
    "vit": (
        hf.AutoModelForImageClassification,
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
        IMAGES[..., :8, :8],
    ),
    "clip": (hf.AutoModel, lambda: hf.CLIPModel(hf.CLIPConfig(text_config=BERT, vision_config=VIT)), None),
    "resnet": (
        hf.AutoModelForImageClassification,
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
        IMAGES,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    prox24_lightning.register_with_transformers()
    prox24_lightning.register_with_transformers()  # a second call changes nothing


@torch.no_grad()
def sparse(make, dtype=torch.float32):
    """A 2:4 model with random weights."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for weight in select_weights(model):
        weight.parameter.mul_(mask_24(weight.parameter, dim=weight.dim))
    return model


def packed(folder, model, **options):
    save_folder(folder, model, find_packable(model), source="a test", **options)
    return folder


@pytest.fixture
def llama(tmp_path):
    model = sparse(FAMILIES["llama"][1])
    return model, packed(tmp_path / "packed", model)


def logits(model, inputs):
    # Tensors of a file lie where they lie there, and some processors round products of unaligned ones otherwise.
    model = copy.deepcopy(model)
    with torch.no_grad():
        if inputs is None:
            return model(IDS, IMAGES[..., :8, :8]).logits_per_image
        return model(inputs).logits


def same_files(left, right):
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()]


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_load_and_save_the_same(family, tmp_path):
    auto, make, inputs = FAMILIES[family]
    model = sparse(make)
    folder = packed(tmp_path / "packed", model)
    loaded = auto.from_pretrained(folder)
    strides = {name: value.stride() for name, value in model.named_parameters()}
    assert {name: value.stride() for name, value in loaded.named_parameters()} == strides
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["fp8_e4m3", "int8"])
def test_rounded_folders_are_the_rounded_dense_model_to_the_bit(family, weights, tmp_path):
    auto, make, _ = FAMILIES[family]
    model = sparse(make, torch.bfloat16)
    folder = packed(tmp_path / "packed", model, weights=weights)
    loaded = auto.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, entry in find_packable(model).dims.items():
            parameter = model.get_parameter(name)
            rounded = round_weight(parameter.movedim(entry, -1).flatten(0, -2), weights)
            parameter.copy_(rounded.view(parameter.movedim(entry, -1).shape).movedim(-1, entry))
    expected = dict(model.named_parameters())
    assert all(torch.equal(found, expected[name].float()) for name, found in loaded.named_parameters())
    assert all(torch.equal(found, expected[name]) for name, found in load_folder(folder, auto).named_parameters())
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["version"], config["weights"]) == (2, weights)
    auto.from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="4KB")
    auto.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []


def test_a_rounded_folder_is_five_bits_a_weight_and_says_so(llama, tmp_path):
    model, _ = llama
    folder = packed(tmp_path / "rounded", model.bfloat16(), weights="fp8_e4m3")
    card = (folder / "README.md").read_text()
    assert "14 of them are rounded to fp8_e4m3 (up to 448) with a float32 scale for each row (`NAME.scales`)" in card
    file = open_packed(folder)
    assert {str(entry.form) for entry in file.packed.values()} == {"fp8_e4m3"}
    assert {file.dtype(name) for name in file.names} == {torch.bfloat16}
    down = "model.layers.0.mlp.down_proj.weight"
    assert file.read_packed(down).nbytes == 16 * (32 * 5 // 8 + 4)


def test_two_rounded_forms_in_one_folder_are_refused(llama, tmp_path):
    model, _ = llama
    dims = find_packable(model).dims
    forms = dict(zip(dims, ["fp8_e4m3", "int8"] * 7, strict=True))
    info = {"source": "a test", "model": "LlamaForCausalLM", "dense": {}}
    with pytest.raises(ValueError, match="rounded to fp8_e4m3 and int8: a folder holds one rounded form"):
        write_folder(tmp_path / "two", model, model.state_dict(), dims, info, forms=forms)


def test_some_weights_may_keep_16_bits(llama, tmp_path):
    model, _ = llama
    dims = find_packable(model).dims
    forms = {name: "int8" for name in dims if "down_proj" in name}
    info = {"source": "a test", "model": "LlamaForCausalLM", "dense": {}}
    folder = tmp_path / "some"
    write_folder(folder, model, model.state_dict(), dims, info, forms=forms)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name)
        assert torch.equal(parameter, round_weight(expected, "int8") if name in forms else expected)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(config["modules_not_rounded"]) == 12
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_a_cpu(llama, device_map):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("goes to the GPU")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_offloading_to_disk_is_refused(llama):
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="offloads layers to disk"):
        hf.AutoModelForCausalLM.from_pretrained(llama[1], device_map=device_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_other_dtypes(llama, dtype):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = model.to(torch.float32 if dtype == "auto" else dtype)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_the_base_model_of_a_folder_with_a_head(llama):
    model, folder = llama
    loaded = hf.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_folders_in_several_files(llama, tmp_path):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("packed-*-of-*.safetensors"))) > 2
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert torch.equal(logits(load_folder(tmp_path / "shards", hf.AutoModelForCausalLM), IDS), logits(model, IDS))
    again.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    assert same_files(tmp_path / "shards", tmp_path / "again") == []
    again.save_pretrained(tmp_path / "shards")  # one file takes the place of many
    assert same_files(folder, tmp_path / "shards") == []


@pytest.mark.parametrize("shards", [None, 4096], ids=["one file", "several files"])
def test_revisions_of_the_hubs_cache(tmp_path, monkeypatch, shards):
    """The cache as huggingface_hub lays it out, without network: a branch, a tag, a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--me--sparse"
    models = {"main": sparse(FAMILIES["llama"][1]), "v1": sparse(FAMILIES["tied"][1])}
    for number, (revision, model) in enumerate(models.items()):
        commit = f"{number}" * 40
        packed(repo / "snapshots" / commit, model, max_shard_bytes=shards)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    for asked, model in [(None, "main"), ("main", "main"), ("v1", "v1"), ("1" * 40, "v1"), ("0" * 40, "main")]:
        options = {} if asked is None else {"revision": asked}
        loaded = hf.AutoModelForCausalLM.from_pretrained("me/sparse", cache_dir=tmp_path, **options)
        assert torch.equal(logits(loaded, IDS), logits(models[model], IDS)), asked
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        hf.AutoModelForCausalLM.from_pretrained("me/sparse", cache_dir=tmp_path, revision="v2")


def test_a_missing_file_of_several_is_named(llama, tmp_path):
    hf.AutoModelForCausalLM.from_pretrained(llama[1]).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    (lost,) = (tmp_path / "shards").glob("packed-00002-of-*")
    lost.unlink()
    with pytest.raises(OSError, match="packed-00002-of-"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match="packed-00002-of-"):
        open_packed(tmp_path / "shards")


def test_folders_of_the_first_format(llama, tmp_path):
    """config.json named no quantization then; load_folder reads such folders, and from_pretrained with the config."""
    model, folder = llama
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_folder(folder, hf.AutoModelForCausalLM), IDS), logits(model, IDS))
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=Prox24Config())
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_without_the_package_no_random_weights(llama):
    code = f"import transformers as hf; hf.AutoModelForCausalLM.from_pretrained({str(llama[1])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no file named model.safetensors" in done.stderr


def test_an_unknown_version_is_one_sentence(llama):
    config = json.loads((llama[1] / "config.json").read_text())
    config["quantization_config"]["version"] = 9
    (llama[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed in version 9 of the format.*update prox24_lightning"):
        hf.AutoModelForCausalLM.from_pretrained(llama[1])


def test_a_damaged_header_is_refused(llama):
    path = llama[1] / "packed.safetensors"
    content = bytearray(path.read_bytes())
    at = content.index(b'"dim')
    content[at + 1 : at + 4] = b"din"
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"packed\.safetensors is damaged"):
        hf.AutoModelForCausalLM.from_pretrained(llama[1])


@pytest.mark.parametrize("shards", [None, 4096], ids=["one file", "several files"])
@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.weight.values", "embed_tokens.weight"], ids=["packed", "dense"])
def test_every_tensor_is_checked_as_it_is_loaded(llama, tmp_path, part, shards):
    folder = packed(tmp_path / "folder", llama[0], max_shard_bytes=shards)
    for path in sorted(folder.glob("packed*.safetensors")):
        with safe_open(path, "pt") as file:
            holds = f"model.{part}" in file.keys()  # noqa: SIM118
            stored = tensor_bytes(file.get_tensor(f"model.{part}")).tobytes() if holds else b""
        if holds:
            content = bytearray(path.read_bytes())
            content[content.index(stored)] ^= 1
            path.write_bytes(content)
            damaged = path.name
    said = re.escape(damaged) + rf" is damaged: the checksum of model\.{re.escape(part)} does not fit"
    for load in (hf.AutoModelForCausalLM.from_pretrained, lambda it: load_folder(it, hf.AutoModelForCausalLM)):
        with pytest.raises(ValueError, match=said):
            load(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["dynamic", "static", "beams", "sampling", "prompt lookup"],
)
def test_generate(llama, options):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for one in (model, loaded):
        torch.manual_seed(3)
        found.append(one.generate(IDS, max_new_tokens=12, pad_token_id=0, eos_token_id=None, **options))
    assert torch.equal(*found)


def test_generate_with_left_padding_and_an_assistant(llama):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    padded = {"input_ids": torch.cat([IDS, IDS.flip(1)]), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    padded["attention_mask"][0, :4] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(**padded, **settings), model.generate(**padded, **settings))
    assisted = loaded.generate(IDS, assistant_model=hf.AutoModelForCausalLM.from_pretrained(folder), **settings)
    assert torch.equal(assisted, model.generate(IDS, **settings))


def test_a_pipeline(llama):
    model, folder = llama
    tiny_tokenizer().save_pretrained(folder)
    outputs = [
        hf.pipeline("text-generation", model=one, tokenizer=tiny_tokenizer())(
            "w3 w4", max_new_tokens=5, do_sample=False
        )
        for one in (model, hf.AutoModelForCausalLM.from_pretrained(folder))
    ]
    assert outputs[0] == outputs[1]


def test_compile_and_export(llama):
    loaded = hf.AutoModelForCausalLM.from_pretrained(llama[1])
    block = loaded.model.layers[0].mlp
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))


def test_copies_and_pickles_are_saved_as_packed_folders(llama, tmp_path):
    loaded = hf.AutoModelForCausalLM.from_pretrained(llama[1])
    torch.save(loaded, tmp_path / "model.pt")
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    for name, one in {"copy": copied, "pickle": torch.load(tmp_path / "model.pt", weights_only=False)}.items():
        one.save_pretrained(tmp_path / name)
        assert same_files(llama[1], tmp_path / name) == []


def test_dequantize_leaves_an_ordinary_model(llama, tmp_path):
    model, folder = llama
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    loaded.save_pretrained(tmp_path / "dense")
    assert loaded.half().dtype == torch.float16
    assert not list((tmp_path / "dense").glob("packed*"))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_loaded_folder_that_is_pruned_again_is_saved_dense(llama, tmp_path):
    loaded = hf.AutoModelForCausalLM.from_pretrained(llama[1])
    report = prune_layerwise(loaded, [{"input_ids": IDS}], method="keep", refine=None, progress=False)
    save_pruned(tmp_path / "pruned", loaded, report)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("pruned", "again"):
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again, IDS), logits(llama[0], IDS))


def test_push_to_hub_uploads_the_card(llama, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, repo_id, **kwargs):
            from pathlib import Path

            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo=repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = llama[1]
    hf.AutoModelForCausalLM.from_pretrained(folder).push_to_hub("me/sparse", token="secret")
    assert uploaded["repo"] == "me/sparse"
    assert uploaded["token"] == "secret"
    for path in folder.iterdir():
        assert uploaded[path.name] == path.read_bytes()
    card = uploaded["README.md"].decode()
    assert "library_name: transformers" in card
    assert "transformers.LlamaForCausalLM.from_pretrained" in card


def test_the_call_of_the_card_runs_as_it_stands(llama):
    card = (llama[1] / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=llama[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_weight_that_is_no_longer_2_4_is_not_saved(llama, tmp_path):
    loaded = hf.AutoModelForCausalLM.from_pretrained(llama[1])
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.fill_(1)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is not 2:4.*model\.dequantize\(\) first"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists() or not any((tmp_path / "again").iterdir())
    loaded.dequantize().save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, torch.ones(32, 16))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_changed_weights_are_named_where_packing_rounds_them(llama, tmp_path, weights):
    folder = packed(tmp_path / "folder", llama[0], weights=weights)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.mul_(torch.linspace(0.9, 1, 16))
    changed = loaded.model.layers[1].mlp.up_proj.weight.clone()
    with nullcontext() if weights is None else pytest.warns(UserWarning, match="up_proj.weight and 0 more .* int8 ag"):
        loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").model.layers[1].mlp.up_proj.weight
    assert torch.equal(again, changed if weights is None else round_weight(changed, "int8"))


def test_registering_loads_nothing_before_it_is_called():
    code = (
        "import sys, prox24_lightning; prox24_lightning.register_with_transformers; "
        "assert 'transformers' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "bert"])
def test_converted_layers_are_saved_in_the_order_of_the_dense_model(family, tmp_path):
    auto, make, _ = FAMILIES[family]
    folder = packed(tmp_path / "packed", sparse(make, torch.bfloat16))
    loaded = auto.from_pretrained(folder, dtype="auto")
    layers = []
    for name, layer in loaded.named_modules():
        weight = getattr(layer, "weight", None)
        if f"{name}.weight" in loaded.hf_quantizer.entries and weight.dim() == 2:
            kind = transposed_kind(layer)
            matrix = weight.detach() if kind is None else weight.detach().t()
            buffer, shape = pack_buffer(matrix), (matrix.shape[0], matrix.shape[1])
            layers.append((name, SemiStructuredLinear(buffer, shape, weight.dtype, layer.bias, "1=few", None, kind)))
    assert len(layers) >= 8
    insert_layers(loaded, layers)
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "auto", {"": 0}])
def test_on_a_gpu_the_layers_run_sparse(tmp_path, device_map):
    config = hf.LlamaConfig(**{**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    model = sparse(lambda: hf.LlamaForCausalLM(config), torch.bfloat16)
    folder = packed(tmp_path / "packed", model)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device_map)
    layers = [module for module in loaded.modules() if isinstance(module, SemiStructuredLinear)]
    assert len(layers) >= 2 * 4
    expected = load_folder(folder, hf.AutoModelForCausalLM, device="cuda")
    ids = IDS.cuda()
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), atol=0.02, rtol=0.05)
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []
    wide = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
    assert not any(isinstance(module, SemiStructuredLinear) for module in wide.modules())
    expanded = load_folder(folder, hf.AutoModelForCausalLM, dtype=torch.float32, device="cuda")
    torch.testing.assert_close(logits(wide, ids), logits(expanded, ids), atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["fp8_e4m3", "int8"])
def test_rounded_folders_run_sparse_on_a_gpu(tmp_path, weights):
    config = hf.LlamaConfig(**{**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    model = sparse(lambda: hf.LlamaForCausalLM(config), torch.bfloat16)
    folder = packed(tmp_path / "packed", model, weights=weights)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda")
    layers = [module for module in loaded.modules() if isinstance(module, SemiStructuredLinear)]
    assert {layer.form for layer in layers} == {weights}
    expected = load_folder(folder, hf.AutoModelForCausalLM, device="cuda")
    ids = IDS.cuda()
    found, wanted = logits(loaded, ids).float(), logits(expected, ids).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.1, "the inputs of layers are rounded"
    block = loaded.model.layers[0].mlp
    x = torch.randn(2, 5, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), atol=0.02, rtol=0.02)
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(folder, tmp_path / "again") == []


@pytest.mark.gpu
def test_one_block_compiles_as_one_graph_on_a_gpu(tmp_path):
    config = hf.LlamaConfig(**{**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4})
    folder = packed(tmp_path / "packed", sparse(lambda: hf.LlamaForCausalLM(config), torch.bfloat16))
    block = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda").model.layers[0].mlp
    x = torch.randn(2, 5, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), atol=0.02, rtol=0.02)


def test_load_packed_takes_several_files(llama, tmp_path):
    model, folder = llama
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    other = hf.LlamaForCausalLM(model.config)
    load_packed(other, open_packed(tmp_path / "shards"))
    assert torch.equal(logits(other, IDS), logits(model, IDS))
