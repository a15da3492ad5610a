"""Layers that keep 16 bits where the others are rounded."""

import pytest
import torch
from torch import nn

from prox24_lightning.convert import convert, convert_model, expand_model
from prox24_lightning.convert.autotune.kernel_table import KernelTimes, choose
from prox24_lightning.convert.eligibility import Target
from prox24_lightning.convert.form_choice import layers_of_16_bits
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
