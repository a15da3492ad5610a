"""The order of the residual stream: found by structure in many kinds of models, and proved by equal outputs."""

import copy

import pytest
import torch
from tiny_reordered import IDS, gpt2, llama
from torch import nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.calibration.free_orders.stream import find_stream_order
from prox24_lightning.solvers.input_order.choose import holders


@torch.no_grad()
def found_in(model, run, width=32):
    return find_stream_order(model, find_blocks(model), width, run, holders(model))


def unequal_channels(model):
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.3)


def olmo2():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, **tokens, num_hidden_layers=2)).eval()
    return model, lambda: model(IDS, use_cache=False).logits


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    model = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).eval()
    return model, lambda: model(IDS).logits


LLAMA = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
MODELS = {
    "llama": (llama, LLAMA),
    "tied": (lambda: llama(tie_word_embeddings=True), LLAMA),
    "all layers of one width": (lambda: llama(num_key_value_heads=4, intermediate_size=32), LLAMA),
    "learned positions and biases": (gpt2, {"c_attn", "c_fc", "lm_head"}),
    "norms behind the layers, and of all queries": (olmo2, LLAMA),
    "norms behind the sums": (bert, {"query", "key", "value", "dense", "decoder"}),
}
"""Kind -> model and run, and the layers that read the stream."""


@pytest.mark.parametrize("kind", MODELS)
def test_a_random_order_of_the_stream_changes_no_output(kind):
    make, readers = MODELS[kind]
    model, run = make()
    unequal_channels(model)
    order = found_in(model, run)
    with torch.no_grad():
        before, dense = run(), copy.deepcopy(model.state_dict())
        order.move(order.random_order())
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])]
    assert any("embed" in name or "wte" in name for name in changed)
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    assert {names[layer] for layer in order.consumers} >= readers


def test_all_blocks_move_with_the_one_that_is_probed():
    model, run = llama(num_hidden_layers=3, tie_word_embeddings=True)
    order = found_in(model, run)
    assert len(order.consumers) == 3 * 5 + 1
    tied = [part for part in order.tensors if part.tensor is model.lm_head.weight]
    assert [part.dim for part in tied] == [1]


def test_weights_are_as_before_after_a_proof():
    model, run = llama()
    dense = copy.deepcopy(model.state_dict())
    found_in(model, run)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_hidden_states_as_outputs_fix_the_order():
    model, _ = llama()
    with pytest.raises(ValueError, match="changes output 0"):
        found_in(model.model, lambda: model.model(IDS, use_cache=False).last_hidden_state)


def test_a_loss_beside_the_logits_is_compared_too():
    model, _ = llama()
    order = found_in(model, lambda: model(IDS, labels=IDS, use_cache=False))
    assert len(order.consumers) == 11


def test_without_outputs_nothing_is_proved():
    model, run = llama()
    with pytest.raises(ValueError, match="there is no output"):
        found_in(model, lambda: (run(), None)[1])


def test_a_weight_that_something_else_holds_fixes_the_order():
    model, run = llama()
    model.other = nn.Embedding(50, 32)
    model.other.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="Embedding.weight is shared"):
        found_in(model, run)


@pytest.mark.parametrize(("width", "reason"), [(36, "do not divide"), (40, "no norm or embedding")])
def test_a_width_that_does_not_fit(width, reason):
    with pytest.raises(ValueError, match=reason):
        found_in(*llama(), width=width)


def test_random_numbers_fix_the_order():
    model, run = llama()
    handle = model.model.embed_tokens.register_forward_hook(lambda *a: a[-1] + torch.randn(32))
    with pytest.raises(ValueError, match="two runs"):
        found_in(model, run)
    handle.remove()
