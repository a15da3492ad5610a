"""The packed folder that the callback leaves."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny_language import tiny_tokenizer
from tiny_runs import quiet_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prox24_lightning import ConvertAndBenchmark, Prox24, RoundWeights, register_with_transformers
from prox24_lightning.convert import open_packed
from prox24_lightning.weights.rounding import round_weight

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


class LanguageModule(LightningModule):
    """A Hugging Face model in a LightningModule, with its tokenizer."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64))
        self.tokenizer = tiny_tokenizer()

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("weights", [None, "fp8_e4m3", "int8"])
def test_save_to_leaves_a_folder_for_from_pretrained(tmp_path, weights):
    module, folder = LanguageModule(), tmp_path / "packed"
    options = {"weights": weights, "input_quantile": 1.0 if weights == "int8" else None}
    callbacks = [Prox24(0, 2, verbose=False), ConvertAndBenchmark(verbose=False, save_to=folder, **options)]
    quiet_trainer(default_root_dir=tmp_path, max_steps=4, callbacks=callbacks).fit(
        module, torch.randint(0, 64, (8, 2, 9))
    )
    register_with_transformers()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    trained = {name: value.bfloat16() for name, value in module.model.state_dict().items()}
    packed = open_packed(folder).packed
    assert {entry.form for entry in packed.values()} == {weights}
    fixed = {name for name, entry in packed.items() if entry.input_scale is not None}
    assert fixed == (set(packed) if weights == "int8" else set())
    if weights is not None:
        trained |= {name: round_weight(trained[name], weights) for name in packed}
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).decode([2]) == "w0"


def test_the_folder_takes_the_form_that_the_run_trained_for(tmp_path):
    callbacks = [
        Prox24(0, 2, strategy="post_step", metric="weight", verbose=False),
        RoundWeights("int8", verbose=False),
        ConvertAndBenchmark(verbose=False, save_to=tmp_path / "packed"),
    ]
    data = torch.randint(0, 64, (8, 2, 9))
    quiet_trainer(default_root_dir=tmp_path, max_steps=4, callbacks=callbacks).fit(LanguageModule(), data)
    assert {entry.form for entry in open_packed(tmp_path / "packed").packed.values()} == {"int8"}
    callbacks[2] = other = ConvertAndBenchmark(verbose=False, weights="fp8_e4m3")
    with pytest.warns(UserWarning, match="RoundWeights trains the model for int8, and .* weights='fp8_e4m3': leave"):
        quiet_trainer(default_root_dir=tmp_path, max_steps=4, callbacks=callbacks).fit(LanguageModule(), data)
    assert other.settings.weights == "fp8_e4m3"
    callbacks = [callbacks[0], ConvertAndBenchmark(verbose=False)]
    quiet_trainer(default_root_dir=tmp_path, max_steps=4, callbacks=callbacks).fit(LanguageModule(), data)
    assert callbacks[1].settings.weights is None


def test_a_folder_that_the_run_will_replace_is_named_first(tmp_path, caplog):
    callback = ConvertAndBenchmark(verbose=False, save_to=tmp_path)
    (tmp_path / "packed.safetensors").touch()
    with caplog.at_level("INFO"):
        callback.on_fit_start(quiet_trainer(default_root_dir=tmp_path, max_steps=1), LanguageModule())
    assert f"{tmp_path} holds a packed model, which the end of this run replaces" in caplog.text


def test_save_to_a_folder_with_dense_weights_is_refused_before_training(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds dense weights"):
        quiet_trainer(default_root_dir=tmp_path, max_steps=1, callbacks=[ConvertAndBenchmark(save_to=tmp_path)]).fit(
            LanguageModule(), torch.randint(0, 64, (2, 2, 9))
        )


def test_save_to_without_a_2_4_weight_is_a_warning(tmp_path):
    callback = ConvertAndBenchmark(verbose=False, save_to=tmp_path / "packed")
    with pytest.warns(UserWarning, match="no weight is 2:4"):
        quiet_trainer(default_root_dir=tmp_path, max_steps=1, callbacks=[callback]).fit(
            LanguageModule(), torch.randint(0, 64, (2, 2, 9))
        )
