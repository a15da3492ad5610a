"""Layers of one input are found in one call of the language model, wherever it lies."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from prox24_lightning.convert.layers.siblings import find_siblings, siblings_inside

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))


class Module(nn.Module):
    """A model in a module with a loop around it, as Lightning has them."""

    def __init__(self):
        super().__init__()
        self.net = llama()

    def forward(self, ids):
        return self.net(ids).logits


def test_names_are_those_of_the_whole_module_and_modes_stay():
    module = Module().train()
    module.net.model.layers[0].mlp.eval()
    modes = [part.training for part in module.modules()]
    attention, mlp = siblings_inside(module)
    start = "net.model.layers.0"
    assert attention.names == tuple(f"{start}.self_attn.{part}_proj" for part in "qkv")
    assert mlp.names == (f"{start}.mlp.gate_proj", f"{start}.mlp.up_proj")
    assert not attention.repeated
    assert all(module.get_submodule(name) is layer for name, layer in zip(mlp.names, mlp.members, strict=True))
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_layer_that_is_called_twice_is_said_so():
    model = llama().eval()
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 2
    assert all(found.repeated for found in find_siblings(model))


def broken(model):
    model.net.model.forward = lambda *args, **kwargs: 1 / 0


def on_meta(model):
    model.net.to("meta")


def no_language_model(model):
    model.net = nn.Linear(2, 2)


@pytest.mark.parametrize("change", [broken, on_meta, no_language_model])
def test_there_may_be_none(change):
    module = Module()
    change(module)
    assert siblings_inside(module) == []
    assert torch.is_grad_enabled()


@torch.inference_mode()
@pytest.mark.parametrize("made_before", [True, False])
def test_they_are_found_within_inference_mode(made_before):
    with torch.inference_mode(not made_before):
        model = llama()
    assert len(siblings_inside(model)) == 2
