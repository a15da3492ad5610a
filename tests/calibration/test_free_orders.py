import copy

import pytest
import torch
from tiny_reordered import IDS, IMAGES, conv_net, gpt2, llama
from torch import nn

from prox24_lightning.calibration.free_orders.find import find_free_orders
from prox24_lightning.calibration.free_orders.prove import proved, relative_difference

LAYERS = (nn.Linear, nn.Conv2d)


@torch.no_grad()
def found_in(model, run, wanted=None):
    """Free orders by the name of their first consumer, and the reasons why others are fixed."""
    names = {module: name for name, module in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, LAYERS) or type(m).__name__ == "Conv1D"]
    orders, reasons = find_free_orders(model, run, layers if wanted is None else wanted)
    orders, refuted = proved(orders, run)
    moved = {
        names[order.consumers[0]]: (order, {f"{names[part.module]}.{part.name}" for part in order.tensors})
        for order in orders
    }
    return moved, {names[layer]: reason for layer, reason in {**reasons, **refuted}.items()}


@torch.no_grad()
def check_equal(model, run, orders):
    """Random orders change weights, but no output."""
    before, dense = run(), copy.deepcopy(model.state_dict())
    for order in orders:
        order.move(order.random_order())
    assert any(not torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


def test_llama_hidden_units_and_inputs_of_output_projections():
    model, run = llama()
    found, _ = found_in(model, run)
    assert set(found) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    order, moved = found["model.layers.0.mlp.down_proj"]
    assert (order.units, order.runs, order.columns.shape) == (48, 1, (48, 1))
    assert moved == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")}
    order, moved = found["model.layers.1.self_attn.o_proj"]
    # Two key-value heads of 8, each read by two query heads.
    assert (order.units, order.runs) == (16, 2)
    assert order.columns[:3].tolist() == [[0, 8], [1, 9], [2, 10]]
    assert order.columns[8].tolist() == [16, 24]
    assert moved == {f"model.layers.1.self_attn.{name}_proj.weight" for name in ("o", "v")}
    check_equal(model, run, [order for order, _ in found.values()])


def test_gpt2_values_in_a_fused_projection():
    model, run = gpt2()
    found, _ = found_in(model, run)
    order, moved = found["transformer.h.0.attn.c_proj"]
    assert (order.units, order.runs) == (32, 4)
    assert moved == {f"transformer.h.0.attn.{name}" for name in ("c_proj.weight", "c_attn.weight", "c_attn.bias")}
    rows = next(part for part in order.tensors if part.name == "bias")
    assert rows.places.flatten().tolist() == list(range(64, 96))
    check_equal(model, run, [order for order, _ in found.values()])


def test_channels_between_convolutions_with_norms_and_depthwise_between():
    model, run = conv_net()
    found, fixed = found_in(model, run)
    assert set(found) == {"one.second", "two.second", "project", "hidden", "head"}
    statistics = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert found["project"][1] == {
        *statistics,
        *(f"{layer}.{name}" for layer in ("expand", "depthwise") for name in ("weight", "bias")),
        "project.weight",
    }
    assert "one.norm.running_var" in found["one.second"][1]
    # The residual stream reaches several layers.
    assert set(fixed) == {"one.first", "two.first", "expand"}
    order = found["one.second"][0]
    assert order.matrix_columns(model.one.second)[1].tolist() == [1 + 16 * position for position in range(9)]
    check_equal(model, run, [order for order, _ in found.values()])


class Twice(nn.Module):
    """Hidden units that a second reader takes, in one of several ways."""

    def __init__(self, reader):
        super().__init__()
        self.up, self.down, self.reader = nn.Linear(8, 16), nn.Linear(16, 8), reader

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.down(hidden) + (hidden[..., :1] if self.reader is None else self.reader(hidden))


def test_a_second_layer_that_reads_the_same_units_moves_along():
    torch.manual_seed(0)
    model, x = Twice(nn.Linear(16, 8)), torch.randn(5, 8)
    found, _ = found_in(model, lambda: model(x))
    order, moved = found["down"]
    assert moved == {"down.weight", "reader.weight", "up.weight", "up.bias"}
    check_equal(model, lambda: model(x), [order])


def test_units_that_something_else_reads_are_fixed_and_left_as_they_were():
    torch.manual_seed(0)
    model, x = Twice(None), torch.randn(5, 8)
    before = copy.deepcopy(model.state_dict())
    found, reasons = found_in(model, lambda: model(x), [model.down])
    assert not found
    assert "another order of these inputs changes output 0" in reasons["down"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_layer_of_zeros_is_seen_too():
    """A LoRA adapter at its start reads nothing, yet its columns have to move."""
    torch.manual_seed(0)
    reader = nn.Linear(16, 8)
    nn.init.zeros_(reader.weight)
    model, x = Twice(reader), torch.randn(5, 8)
    assert "reader.weight" in found_in(model, lambda: model(x))[0]["down"][1]


def test_random_outputs_are_no_ground_for_a_proof():
    model, x = Twice(nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 8))).train(), torch.randn(5, 8)
    found, reasons = found_in(model, lambda: model(x), [model.down])
    assert not found
    assert "two runs on equal inputs" in reasons["down"]


def test_heads_too_narrow_for_two_groups_are_fixed():
    model, run = llama(num_attention_heads=8, num_key_value_heads=8)
    found, reasons = found_in(model, run)
    assert set(found) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert "32 inputs in 8 heads" in reasons["model.layers.0.self_attn.o_proj"]


def test_weights_that_are_computed_from_others_are_fixed():
    model, run = conv_net()
    nn.utils.parametrizations.weight_norm(model.one.first)
    found, reasons = found_in(model, run)
    assert "one.second" not in found
    assert "one.second" in reasons


def test_an_error_while_it_is_proved_leaves_weights_as_they_were():
    model, run = conv_net()
    orders, _ = find_free_orders(model, run, [model.project])
    before, calls = copy.deepcopy(model.state_dict()), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(IMAGES)

    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        proved(orders, failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_large_feature_hides_no_difference():
    reference = torch.ones(10, 8)
    reference[:, 0] = 1e4
    changed = reference.clone()
    changed[:, 1:] += 0.5
    assert relative_difference(changed, reference) == pytest.approx(0.5 * 7 / 8)


@pytest.mark.gpu
def test_a_gpu_finds_the_orders_of_a_cpu():
    model, run = llama()
    wanted = {
        name: (order.columns.tolist(), order.runs, moved) for name, (order, moved) in found_in(model, run)[0].items()
    }
    model.cuda()
    found, _ = found_in(model, lambda: model(IDS.cuda(), use_cache=False).logits)
    assert {name: (order.columns.tolist(), order.runs, moved) for name, (order, moved) in found.items()} == wanted
