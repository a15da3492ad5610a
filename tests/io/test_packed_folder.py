"""The import path that published model cards name."""

from __future__ import annotations

import torch
from tiny_language import save_tiny_llama
from transformers import AutoModelForCausalLM

from prox24_lightning.convert.format.shards import open_packed
from prox24_lightning.convert.packed_model import find_packable, load_packed
from prox24_lightning.io.packed_folder import load_folder, save_folder
from prox24_lightning.mask import mask_24


def test_the_call_of_an_old_model_card_loads_the_same_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "dense"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(mask_24(parameter))
    save_folder(tmp_path / "packed", model, find_packable(model), source="a test")

    import prox24_lightning.commands.packed_folder

    old = prox24_lightning.commands.packed_folder.load_folder(tmp_path / "packed", AutoModelForCausalLM)
    new = load_folder(tmp_path / "packed", AutoModelForCausalLM)
    for (name, left), right in zip(old.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
        assert torch.equal(left, model.state_dict()[name]), name


def test_a_model_loaded_in_inference_mode_can_be_trained(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "dense"))
    save_folder(tmp_path / "packed", model, find_packable(model), source="a test")
    with torch.inference_mode():
        loaded = load_folder(tmp_path / "packed", AutoModelForCausalLM)
        filled = load_packed(model, open_packed(tmp_path / "packed"))
    assert filled == ()
    for one in (loaded, model):
        one(torch.tensor([[1, 2, 3]])).logits.sum().backward()
