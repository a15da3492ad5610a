"""Parameters in groups: who decays, and who has the rate of embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prox24_lightning.finetune import parameter_groups


def llama(tied):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_the_head_are_slow_and_layers_of_their_shape_are_not(tied):
    model = llama(tied)
    matrices, vectors, slow = parameter_groups(model, lr=2.0, weight_decay=0.3, embedding_lr=0.25)
    assert set(slow["params"]) == {model.model.embed_tokens.weight, model.lm_head.weight}
    assert slow["lr"] == 0.5
    assert matrices["lr"] == vectors["lr"] == 2.0
    assert [group["weight_decay"] for group in (matrices, vectors, slow)] == [0.3, 0.0, 0.3]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(names[parameter].endswith("_proj.weight") for parameter in matrices["params"])
    assert all("norm" in names[parameter] for parameter in vectors["params"])
    assert sum(len(group["params"]) for group in (matrices, vectors, slow)) == len(names)


def test_at_the_same_rate_nothing_is_apart_and_frozen_parameters_are_left_out():
    model = llama(True)
    model.model.norm.requires_grad_(False)
    matrices, vectors = parameter_groups(model, lr=1.0, embedding_lr=1.0)
    assert model.lm_head.weight in set(matrices["params"])
    assert model.model.norm.weight not in set(vectors["params"])


def test_at_zero_embeddings_stay_as_they_are():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    before = model[0].weight.clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, embedding_lr=0))
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="embedding_lr=-1 must be finite and not negative"):
        parameter_groups(model, lr=0.1, embedding_lr=-1)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_parametrized_embeddings_and_bags_are_embeddings(kind):
    table = kind(8, 4)
    nn.utils.parametrizations.weight_norm(table)
    model = nn.Sequential(table, nn.Linear(4, 4))
    _, _, slow = parameter_groups(model, lr=1.0, embedding_lr=0.5)
    assert set(slow["params"]) == set(table.parameters())


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_rates_that_are_no_numbers(rate):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        parameter_groups(llama(True), lr=0.1, embedding_lr=rate)
