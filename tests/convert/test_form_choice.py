"""Layers that keep 16 bits where the others are rounded."""

import pytest
import torch
import transformers as hf
from torch import nn

from prox24_lightning.convert import convert, convert_model, expand_model
from prox24_lightning.convert.autotune.kernel_table import KernelTimes, choose
from prox24_lightning.convert.eligibility import Target
from prox24_lightning.convert.form_choice import layers_of_16_bits
from prox24_lightning.convert.kernel_report import kernel_section
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import round_weight


def test_patterns_take_the_layers_that_servers_run_as_one_with_them():
    names = [f"h.{i}.{key}_proj" for i in range(2) for key in ("q", "k", "v", "o", "gate", "up", "down")]
    assert layers_of_16_bits(names, ["*.1.down_proj"]) == {"h.1.down_proj"}
    assert layers_of_16_bits(names, ["h.0.k_proj", "h.1.gate*"]) == {
        *(f"h.0.{key}_proj" for key in "qkv"),
        "h.1.gate_proj",
        "h.1.up_proj",
    }
    assert layers_of_16_bits(names, []) == frozenset()
    with pytest.raises(ValueError, match="keep_16bit='h.2.*' matches no layer"):
        layers_of_16_bits(names, ["*.down_proj", "h.2.*"])


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(mask_24(layer.weight))
    return model


def test_a_layer_keeps_16_bits_beside_rounded_ones(monkeypatch):
    asked = []

    def tables(shapes, dtype, *, form, keep_dense, **_):
        asked.append((form, shapes))
        return {
            s: choose(s, [KernelTimes(256, 10.0, {"cusparselt:1": 4.0})], keep_dense=keep_dense, form=form)
            for s in shapes
        }

    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    monkeypatch.setattr(convert, "kernel_tables", tables)
    model = mlp()
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    done = convert_model(
        model, token_counts=(256,), weights="int8", keep_16bit=["0"], input_scales={"0": 1.0, "2": 0.5}
    )
    assert done.converted == ("0", "2")
    assert (model[0].form, model[2].form) == (None, "int8")
    assert sorted(asked, key=str) == [("int8", [(64, 128)]), (None, [(128, 64)])]  # kernels of the layer's own form
    expand_model(model)
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[2].weight, round_weight(weights[1], "int8"))


def test_what_cannot_be_kept_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    model = mlp()
    with pytest.raises(ValueError, match="keep_16bit is for rounded weights, and weights=None"):
        convert_model(model, keep_16bit=["0"])
    with pytest.raises(ValueError, match="keep_16bit='1' matches no layer"):
        convert_model(model, weights="int8", keep_16bit=["1"])
    with pytest.raises(ValueError, match="0 is to be dense in float8 and to keep 16 bits"):
        convert_model(model, weights="fp8_e4m3", keep_16bit=["0"], dense_fp8=["0"])
    assert isinstance(model[0], nn.Linear)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
WHOLE = (96, 64)  # query, key and value as one


def llama(**sizes):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **sizes})).bfloat16().eval()
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(mask_24(layer.weight))
    return model


@pytest.fixture
def measured(monkeypatch):
    """A GPU on which the listed shapes lose packed, and also in float8 those that are listed there; all else wins."""
    asked = []

    def pretend(slower=(), slower_fp8=()):
        def tables(shapes, dtype, *, form, keep_dense, **_):
            asked.append(list(shapes))
            found = {}
            for s in shapes:
                fp8 = 12.0 if s in slower_fp8 else 9.0
                us = {"cusparselt:1": 11.0 if s in slower else 4.0}
                found[s] = choose(
                    s, [KernelTimes(8, 10.0, us, (), fp8, "dense_fp8:1")], keep_dense=keep_dense, form=form
                )
            return found

        monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
        monkeypatch.setattr(convert, "kernel_tables", tables)
        return asked

    return pretend


def packed_parts(model, done):
    names = [name for name in done.converted if name not in done.dense_fp8 and "layers.1." in name]
    return [name.rpartition(".")[2].removesuffix("_proj") for name in names]


EVERY = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.mark.parametrize("form", [None, "fp8_e4m3"])
def test_layers_that_decoding_joins_choose_as_one(measured, form):
    asked = measured(slower=[(16, 64)])  # a key or a value alone
    model = llama()
    done = convert_model(model, token_counts=(8,), weights=form)
    assert packed_parts(model, done) == EVERY
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.kernels == "8=cusparselt:1"
    assert asked == [[(64, 64), (16, 64), (128, 64), (64, 128), WHOLE, (256, 64)]]
    joined = {table.shape: table.joined for table in done.tables if table.joined}
    assert joined == {WHOLE: "q_proj + k_proj + v_proj", (256, 64): "gate_proj + up_proj"}
    assert "(96, 64) as one: q_proj + k_proj + v_proj" in str(kernel_section(done.tables))


def test_products_of_one_shape_are_all_named(measured):
    measured()
    done = convert_model(llama(num_key_value_heads=4, intermediate_size=96), token_counts=(8,))
    (joined,) = [table.joined for table in done.tables if table.joined]
    assert joined == "q_proj + k_proj + v_proj, gate_proj + up_proj"


def test_joined_layers_are_dense_together(measured):
    measured(slower=[WHOLE], slower_fp8=[WHOLE])
    model = llama()
    done = convert_model(model, token_counts=(8,), weights="fp8_e4m3")
    assert packed_parts(model, done) == EVERY[3:]
    why = {verdict.name.rpartition(".")[2]: verdict.why for verdict in done.dense}
    assert why["q_proj"].endswith(": stays dense (measured as one: q_proj + k_proj + v_proj)")
    assert why["q_proj"] == why["v_proj"]
    measured(slower=[WHOLE])
    done = convert_model(llama(), token_counts=(8,), weights="fp8_e4m3")
    in_fp8 = {name.rpartition(".")[2] for name in done.dense_fp8}
    assert in_fp8 == {"q_proj", "k_proj", "v_proj"}


def test_layers_that_are_not_joined_choose_alone(measured):
    measured(slower=[(16, 64)], slower_fp8=[(16, 64)])
    alone = [part for part in EVERY if part not in ("k", "v")]
    inner = nn.ModuleDict({"layers": llama().model.layers})  # nothing here can be called with a token
    done = convert_model(inner, token_counts=(8,), weights="fp8_e4m3")
    assert packed_parts(inner, done) == alone
    scales = {"model.layers.1.self_attn.q_proj": 0.5}
    model = llama()
    done = convert_model(model, token_counts=(8,), weights="fp8_e4m3", input_scales=scales)
    assert packed_parts(model, done) == alone
    assert "layers.0.self_attn.k_proj" in " ".join(done.converted)  # the first block has no fixed scale
    model = llama()
    assert packed_parts(model, convert_model(model, token_counts=(8,), keep_dense=True)) == alone
