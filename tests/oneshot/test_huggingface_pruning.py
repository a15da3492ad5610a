import warnings

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from prox24_lightning.calibration.blocks import find_blocks, hidden_state
from prox24_lightning.cli.main import main
from prox24_lightning.finetune import load_masks
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity, token_sequences
from prox24_lightning.mask import is_24, read_masks
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.save import save_pruned

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LANGUAGE_MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "qwen2, windows differ by layer": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, **SLIDING)),
    "gpt2, transposed weights": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            word_embed_proj_dim=16,
        )
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
}
LAYERS_A_BLOCK = {"llama": 7, "mistral": 7, "qwen2": 7, "gpt2": 4, "opt": 6, "gpt-neox": 4, "bert": 6}


def token_batches(count=3):
    ids = torch.randint(3, 64, (count, 2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def pruned(model, batches=None, **options):
    return prune_layerwise(
        model, batches or token_batches(), progress=False, **{"steps": 6, "method": "prox"} | options
    )


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_linear_layer_of_every_block_is_pruned_on_its_true_inputs(family):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[family]().eval()
    report = pruned(model, refine=None, method="wanda")
    assert len(report.layers) == 2 * LAYERS_A_BLOCK[family.split(",")[0]]
    assert all(layer.block for layer in report.layers), "walked block by block"
    transposed = family.startswith("gpt2")
    for name, mask in report.masks.items():
        assert is_24(model.get_parameter(name), dim=0 if transposed else 1)
        assert not model.get_parameter(name)[~mask].any()
    # The last layer's tokens and energy, seen in an ordinary pass of the finished model: the blocks were called with
    # the arguments that the model itself passes.
    last = report.layers[-1]
    seen = []
    layer = model.get_submodule(last.name.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in token_batches():
            model(**batch)
    assert last.tokens == sum(len(rows) for rows in seen)
    assert 0 < last.loss < 0.5


def test_the_blocks_of_t5_share_the_position_bias_of_the_first():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 64}
    model = hf.T5EncoderModel(hf.T5Config(**sizes)).eval()
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_(0, 3)
    data = [{"input_ids": torch.randint(3, 64, (2, length))} for length in (12, 9)]
    cpu = torch.device("cpu")
    with BlockInputs.recorded(model, find_blocks(model), data, home=cpu, device=cpu, offload="device") as inputs:
        for number, batch in enumerate(data):
            seen = []
            hook = model.encoder.block[-1].register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][0]))
            model(**batch)
            hook.remove()
            for index, block in enumerate(model.encoder.block):
                inputs.hidden[number] = hidden_state(inputs.run(index, block, number), "")
            torch.testing.assert_close(inputs.hidden[number], seen[0])


def test_a_vision_transformer_keeps_its_patches_and_head_dense():
    model = hf.ViTForImageClassification(
        hf.ViTConfig(**{k: v for k, v in SIZES.items() if k[:3] not in ("voc", "max")}, image_size=8, patch_size=4)
    )
    report = pruned(model, [{"pixel_values": torch.randn(4, 3, 8, 8)}])
    assert len(report.layers) == 12
    assert {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"} <= {
        w.name for w in report.skipped
    }


def test_caches_are_off_during_the_walk_and_the_setting_comes_back():
    model = LANGUAGE_MODELS["llama"]()
    assert model.config.use_cache is True
    pruned(model)
    assert model.config.use_cache is True


class NotSerializable:
    """What transformers leaves on a model that it has de-quantized from a GGUF file."""

    def is_serializable(self):
        return False


def test_a_saved_model_loads_like_any_other_and_gives_the_same_logits(tmp_path):
    model = LANGUAGE_MODELS["llama"]().eval()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = NotSerializable()
    report = pruned(model)
    (tmp_path / "packed.safetensors").write_text("of another model, which prox24 would read first")
    save_pruned(tmp_path, model, report, protocol={"data": "random tokens", "seed": 0})
    assert not (tmp_path / "packed.safetensors").exists()
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = token_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    masks = load_masks(loaded, tmp_path / "masks.safetensors", expect="same").masks
    assert all(torch.equal(masks[name], mask) for name, mask in report.masks.items())
    assert read_masks(tmp_path / "masks.safetensors").info["protocol"] == {"data": "random tokens", "seed": "0"}
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert "sparsity_config" not in (tmp_path / "config.json").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "| data | random tokens |" in card
    assert "| method | prox |" in card
    assert "model.layers.1.mlp.down_proj.weight" in card


WORDS = [f"w{number}" for number in range(60)]


class Words(TextSource):
    """Sentences of a few words; the splits share none."""

    def texts(self, split):
        half = WORDS[:30] if split == "calibration" else WORDS[30:]
        return [" ".join(half[(7 * i + j) % 30] for j in range(12)) for i in range(40)]

    def describe(self):
        return "made-up words"


@pytest.fixture
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_sequences_are_cut_from_joined_documents(tokenizer):
    ids = token_sequences(tokenizer, ["w0 w1 w2", "w3"], 2, 3)
    assert sorted(ids.flatten().tolist()) == [1, 1, 2, 3, 4, 5]
    assert ids.shape == (2, 3)


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text holds 6 tokens, which make 0 sequences of 8, but 2 are asked for"):
        token_sequences(tokenizer, ["w0 w1 w2", "w3"], 2, 8)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    model = LANGUAGE_MODELS["llama"]().eval()
    ids = torch.randint(0, 64, (5, 8))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert perplexity(model, ids, batch_size=2) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_the_command_prunes_saves_and_scores(tmp_path, tokenizer, capsys, monkeypatch):
    torch.manual_seed(0)
    LANGUAGE_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    config = tmp_path / "prune.yaml"
    config.write_text(
        f"model: {{name: {tmp_path / 'dense'}}}\n"
        f"data: {{class_path: {__name__}.Words}}\n"
        f"output: {tmp_path / 'elsewhere'}\n"
        "sequences: 6\nlength: 16\nbatch_size: 2\neval_sequences: 4\nsteps: 5\n"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
        main(["prune", "--config", str(config), "--eval_sequences", "3", "--output", str(tmp_path / "sparse")])
    out = capsys.readouterr().out
    assert "held-out perplexity, dense" in out
    assert "held-out perplexity, 2:4" in out
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, mask in load_masks(model, tmp_path / "sparse" / "masks.safetensors", expect="same").masks.items():
        assert is_24(model.get_parameter(name))
        assert not model.get_parameter(name)[~mask].any()
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "sparse").eos_token == "</s>"
    assert (tmp_path / "sparse" / "layerwise.png").exists()
    assert "made-up words" in (tmp_path / "sparse" / "README.md").read_text()


def refusal(capsys, *words):
    """What ``prox24 prune`` says on stderr where it ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--model.name", "nowhere", *map(str, words)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_text_must_be_named(capsys):
    assert refusal(capsys).startswith("prox24 prune: text is missing: name a file, a folder or a data set")


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    told = refusal(capsys, "--data", f"{__name__}.Words", "--output", tmp_path / "file" / "sub")
    assert told.startswith(f"prox24 prune: {tmp_path / 'file' / 'sub'} cannot be a folder, because")
    assert len(told.splitlines()) == 1


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"model.name='no_such_model': no such package is installed"):
        Pretrained("no_such_model", package=True).load()
