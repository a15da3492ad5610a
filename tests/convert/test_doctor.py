"""What the doctor says: states, shares, limits, Amdahl's law, and no promise about convolutions."""

from __future__ import annotations

import json
import re

import pytest
import torch
from experts import MixtureModel, expert_weights
from torch import nn

from prox24_lightning.convert import Target, check_layer
from prox24_lightning.convert.doctor import diagnose
from prox24_lightning.convert.state_dict_model import layers_of
from prox24_lightning.mask import mask_24

HOPPER = Target("pretended H200", (9, 0), "cusparselt")
PASCAL = Target("pretended P100", (6, 0), "cusparselt")


def pruned(layer, dim=1):
    with torch.no_grad():
        layer.weight.mul_(mask_24(layer.weight, dim=dim))
    return layer


def net():
    """Three quarters of the linear weights are 2:4: 2048 + 1024 of 4096."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "up": pruned(nn.Linear(32, 64)),
            "out": pruned(nn.Linear(32, 32)),
            "head": nn.Linear(32, 32),
            "embed": nn.Embedding(100, 32),
            "conv": pruned(nn.Conv2d(16, 16, 3)),
        }
    )


@pytest.mark.parametrize("target, state", [(HOPPER, "sparse"), (None, "fits"), (PASCAL, "dense")])
def test_states_by_what_the_machine_is(target, state):
    found = diagnose(net(), target=target)
    assert [layer.state for layer in found.layers] == [state, state, "dense", "dense", "dense"]
    assert [layer.name for layer in found.able] == ([] if state == "dense" else ["up", "out"])
    words = {"sparse": r"^$", "fits": "^no CUDA GPU in use$", "dense": "sparse tensor cores need 8.0"}
    assert re.search(words[state], found.layers[0].why)
    assert found.sparse_share == (0.0 if state == "dense" else 0.75)


def test_limits_are_those_of_bytes_and_of_arithmetic():
    found = diagnose(net(), target=HOPPER, token_counts=(1, 64, 65))
    assert found.layers[0].limit == {1: 1 / 0.5625, 64: 1 / 0.5625, 65: 2.0}
    assert found.layers[2].limit == {}
    # Amdahl: a quarter of the time stays, three quarters shrink by the limit.
    assert found.limit == pytest.approx({1: 1 / (0.25 + 0.75 * 0.5625), 64: 1 / (0.25 + 0.75 * 0.5625), 65: 1.6})
    assert found.expected == {1: None, 64: None, 65: None}


def test_measured_gains_are_expected_ones():
    gains = {("up", 1): 1.5, ("out", 1): 1.0, ("up", 64): 3.0}
    found = diagnose(
        net(), target=HOPPER, token_counts=(1, 64), gain=lambda verdict, tokens: gains.get((verdict.name, tokens))
    )
    assert found.layers[0].expected == {1: 1.5, 64: 3.0}
    assert found.layers[1].expected == {1: 1.0, 64: None}
    assert found.layers[2].expected == {}
    assert found.expected[1] == pytest.approx(1 / (0.25 + 0.25 + 0.5 / 1.5))
    assert found.expected[64] is None, "one layer of the two was not measured"


@pytest.mark.parametrize("gain, notes", [(0.97, 1), (0.99, 0), (2.0, 0)])
def test_layers_that_would_be_slower_are_noted(gain, notes):
    found = diagnose(net(), target=HOPPER, gain=lambda verdict, tokens: gain if tokens == 16 else 1.5)
    assert sum("2 layers would be slower at some" in note for note in found.notes) == notes


def test_float32_is_judged_as_what_it_would_be_cast_to():
    assert diagnose(net(), dtype=torch.float16).layers[0].state == "fits"
    assert "float32: the sparse kernels take" in diagnose(net(), dtype=torch.float32).layers[0].why


def test_convolutions_are_promised_nothing():
    found = diagnose(net(), target=HOPPER)
    why = found.layers[-1].why
    assert why == (
        "no sparse convolution kernel in torch: stays dense with zeros; TensorRT may use its zeros: see check_onnx"
    )
    assert "Convolutions run dense in torch" in found.notes[0]
    assert "nothing is promised" in found.notes[0]
    assert diagnose(nn.Sequential(nn.Linear(512, 512)), target=HOPPER).notes == ()


def test_no_gain_is_foretold_for_tiny_layers():
    tiny = nn.Sequential(nn.Linear(32, 32))
    assert "All of these layers are too small to gain" in diagnose(tiny, target=HOPPER).notes[0]
    assert diagnose(tiny, target=HOPPER, gain=lambda verdict, tokens: 1.2).notes == (), "measured"
    both = diagnose(nn.Sequential(nn.Linear(32, 32), nn.Linear(512, 512)), target=HOPPER)
    assert "1 of these 2 layers" in both.notes[0]


@pytest.mark.parametrize(
    "conv, words",
    [
        (nn.Conv2d(16, 16, 3), r"not for TensorRT either: 576 of 576 groups"),
        (pruned(nn.Conv2d(16, 16, 3), dim=0), r"not for TensorRT either: \d+ of 576 groups"),
        (nn.Conv2d(3, 16, 3), "not for TensorRT either: 3 input channels do not divide by 4"),
        (pruned(nn.Conv1d(8, 16, 3)), "TensorRT may use its zeros"),
    ],
)
def test_what_is_possible_for_a_convolution(conv, words):
    with torch.no_grad():
        conv.weight += conv.weight.sign()  # no value is near zero
    found = check_layer(conv, name="conv", target=HOPPER)
    assert re.search(words, found.note)
    assert not found.fits
    assert found.role == "convolution"


def test_json_is_strict_and_whole():
    found = json.loads(diagnose(net(), machine={"gpu": "none"}).to_json())
    assert found["machine"] == {"gpu": "none"}
    assert found["layers"][0]["limit"]["1"] == 1 / 0.5625
    assert {layer["name"] for layer in found["layers"]} == {"up", "out", "head", "embed", "conv"}


def test_a_model_without_weights():
    found = diagnose(nn.ReLU())
    assert (found.layers, found.able, found.sparse_share) == ((), (), 0.0)
    assert found.limit[1] == 1.0


def test_a_state_dict_as_layers():
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 4), "conv": nn.Conv2d(4, 4, 3, bias=False)})})
    state = {**model.state_dict(), "embedding.weight": torch.randn(9, 4), "norm.weight": torch.ones(4)}
    layers = layers_of(state)
    kinds = {name: type(module).__name__ for name, module in layers.named_modules() if name and "." in name}
    assert kinds == {"block.up": "Linear", "block.conv": "Conv2d"}
    assert type(layers.embedding) is nn.Embedding
    assert layers.get_submodule("block.up").weight.data_ptr() == state["block.up.weight"].data_ptr()
    assert torch.equal(layers.get_submodule("block.up").bias, state["block.up.bias"])
    with pytest.raises(ValueError, match="no weight of two or more dimensions"):
        layers_of({"norm.weight": torch.ones(4)})


def test_experts_in_one_parameter_count_and_stay_dense():
    model = MixtureModel(1)
    found = {layer.name: layer for layer in diagnose(model).layers}
    experts = found["blocks.0.experts"]
    assert experts.state == "dense"
    assert "experts in one 3-D parameter: no sparse kernel" in experts.why
    weights = sum(parameter.numel() for parameter in expert_weights(model).values())
    assert experts.share == pytest.approx(weights / (weights + model.blocks[0].proj.weight.numel()))


def test_what_a_dense_model_would_gain_once_pruned():
    model = net()
    with torch.no_grad():
        model["out"].weight.normal_()
    found = diagnose(model, target=HOPPER, token_counts=(1, 65))
    assert [layer.name for layer in found.layers if layer.once_pruned] == ["out"], "no head"
    assert found.layers[1].limit == {1: 1 / 0.5625, 65: 2.0}
    assert found.sparse_share == 0.5, "up alone"
    assert (found.once_pruned.layers, found.once_pruned.share) == (2, 0.75)
    assert found.once_pruned.limit == pytest.approx({1: 1 / (0.25 + 0.75 * 0.5625), 65: 1.6})
    assert found.limit[65] == pytest.approx(1 / (0.5 + 0.25))


def test_what_pruning_does_not_take_is_not_promised():
    """Heads and shapes that do not fit stay dense; a GPU that runs nothing gains nothing."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 30))
    found = diagnose(model, target=HOPPER)
    assert found.once_pruned.layers == 1
    assert diagnose(model, target=PASCAL).once_pruned is None
    assert diagnose(nn.ModuleDict({"up": pruned(nn.Linear(32, 64))}), target=HOPPER).once_pruned is None
    assert diagnose(model.to("meta"), target=HOPPER).once_pruned is None
