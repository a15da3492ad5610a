"""Layers that train rounded multiply what the packed layer will multiply, and are themselves again afterwards."""

from __future__ import annotations

import copy
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prox24_lightning.convert.eligibility import why_not_linear
from prox24_lightning.convert.kernels import reference
from prox24_lightning.convert.kernels.buffers import pack_buffer
from prox24_lightning.mask import mask_24
from prox24_lightning.sparsify.rounded_training import RoundedTraining, sparse_weights
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.rounding import expand_rows, round_rows, round_tokens, round_weight
from prox24_lightning.weights.selection import select_weights
from recipes.compiled_blocks import compile_blocks

FORMS = ["fp8_e4m3", "int8"]


class Conv1D(nn.Module):
    """The layer of Hugging Face's GPT-2: a weight of (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def pruned(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= mask_24(module.weight)
            elif is_transposed_linear(module):
                module.weight *= mask_24(module.weight, dim=0)
    return model


def seeded(*layers):
    return pruned(nn.Sequential(*layers))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rounded(model, form="fp8_e4m3", inputs=True, weights=None):
    training = RoundedTraining(form, 0, inputs=inputs)
    training.prepare(10)
    assert training.update(model, sparse_weights(model) if weights is None else weights, 0, frozen=True)
    return training


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(16, 32), lambda: Conv1D(32, 16)], ids=["linear", "conv1d"])
def test_the_forward_is_the_packed_layers_to_the_bit(form, layer):
    model = seeded(layer())
    matrix = model[0].weight.detach().t() if is_transposed_linear(model[0]) else model[0].weight.detach()
    with torch.no_grad():
        model[0].bias.copy_(model[0].bias.bfloat16())
    inputs = torch.randn(5, 16).bfloat16()
    buffer = pack_buffer(matrix.bfloat16().contiguous(), form)
    wanted = reference.linear(inputs, buffer, model[0].bias.detach(), torch.bfloat16, (32, 16), form)
    rounded(model, form)
    # Computed in float32, as the kernels accumulate; under autocast with what the packed layer's weight is in bfloat16.
    assert torch.equal(model(inputs.float()).bfloat16(), wanted)
    weight = round_weight(matrix.bfloat16(), form)
    tokens = round_tokens(inputs, form)
    tokens = (tokens.values.float() * tokens.scales.unsqueeze(-1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), F.linear(tokens, weight, model[0].bias.bfloat16()))


def test_float16_rounds_from_float16():
    model = seeded(nn.Linear(16, 16, bias=False)).half()
    inputs = torch.randn(3, 16).half()
    wanted = F.linear(inputs, round_weight(model[0].weight.detach(), "int8"))
    rounded(model, "int8", inputs=False)
    assert torch.equal(model(inputs), wanted)


def test_gradients_reach_weight_and_inputs_as_if_nothing_were_rounded():
    model = seeded(nn.Linear(16, 8))
    rounded(model)
    inputs = torch.randn(4, 16, requires_grad=True)
    gradient = torch.randn(4, 8)
    model(inputs).backward(gradient)
    rows = round_rows(model[0].weight.detach().bfloat16(), "fp8_e4m3")
    seen = expand_rows(rows.values, rows.scales, torch.float32)
    torch.testing.assert_close(inputs.grad, gradient @ seen)
    assert (model[0].weight.grad != 0).all()  # pruned entries too: their gradient is masked elsewhere


def test_a_layer_that_is_called_twice_and_one_that_trains_under_no_grad():
    model = seeded(nn.Linear(16, 16))
    rounded(model)
    inputs = torch.randn(2, 16)
    model(model(inputs)).sum().backward()
    with torch.no_grad():
        again = model(inputs)
    with torch.inference_mode():
        assert torch.equal(model(inputs), again)
    assert torch.equal(model(inputs).detach(), again)


def test_names_values_and_forward_are_back_afterwards():
    model = seeded(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    before, names = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
    inputs = torch.randn(3, 16)
    unrounded = model(inputs)
    training = rounded(model)
    assert training.layers == 2
    assert not torch.equal(model(inputs), unrounded)
    assert list(model.state_dict()) == list(before)
    training.remove()
    assert torch.equal(model(inputs), unrounded)
    assert [set(vars(module)) for module in model.modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_compute_with_their_own_weight_and_pickles_with_the_forward_of_their_class():
    model = seeded(nn.Linear(16, 16))
    inputs = torch.randn(3, 16)
    unrounded = model(inputs)
    rounded(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs), model(inputs))
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert not twin(inputs).any()
    stored = pickle.loads(pickle.dumps(model))
    assert torch.equal(stored(inputs), unrounded)
    assert why_not_linear(stored[0], None) is None  # it can be converted


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input)


def test_layers_that_conversion_leaves_dense_are_named():
    model = seeded(nn.Linear(16, 16), OwnForward(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv1d(8, 8, 1))
    model[3].weight = model[2].weight
    weights = select_weights(model, targets=["*.weight", "2.weight"], skip=["4.*"]).chosen
    training = rounded(model, weights=[*weights, *select_weights(model, targets=["4.*"]).chosen])
    assert set(training.unrounded) == {"1.weight", "2.weight", "4.weight"}
    assert training.layers == 1
    assert "forward of its own" in training.unrounded["1.weight"]
    assert "tied" in training.unrounded["2.weight"]
    assert training.exceptions().startswith("3 of 4 2:4 weights train without rounding to fp8_e4m3: 1.weight (OwnFor")
    column = seeded(nn.Linear(16, 16))
    chosen = select_weights(column, geometry="column").chosen
    assert "inputs" in rounded(column, weights=chosen).unrounded["0.weight"]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return F.linear(self.called(x), self.used.weight)


def test_a_weight_that_is_used_without_its_layer_is_named_once():
    model = pruned(Functional())
    training = rounded(model)
    model(torch.randn(2, 16))
    said = [training.uncalled() for _ in range(20)]
    assert [index for index, text in enumerate(said) if text] == [7]
    assert said[7].startswith("used trained without rounding")
    short = rounded(pruned(Functional()))
    assert short.uncalled() is None
    assert "used and 1 more" in short.uncalled(last=True)
    assert short.uncalled(last=True) is None


def test_exchanged_layers_are_followed():
    model = seeded(nn.Linear(16, 16), nn.Linear(16, 16))
    training = rounded(model)
    model[1] = pruned(nn.Linear(16, 16))
    assert not training.update(model, sparse_weights(model), 1, frozen=True)
    assert "forward" in vars(model[1])
    assert training.layers == 3  # with the old one, until the end
    assert training.exceptions() is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(10))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a code generator; the graphs that were compiled."""
    compiler, found = torch.compile, []

    def backend(graph, inputs):
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend, fullgraph=True))
    return found


def test_compiled_blocks_share_one_graph_and_round_to_the_same_bits(graphs):
    model = pruned(Blocks())
    plain = copy.deepcopy(model)
    assert compile_blocks(model) == 10
    inputs = torch.randn(2, 16, requires_grad=True)
    unrounded = model(inputs)
    assert len(graphs) == 1
    training, _ = rounded(model), rounded(plain)
    assert torch.equal(model(inputs), plain(inputs))
    assert len(graphs) == 2
    assert training.uncalled(last=True) is None
    training.remove()
    assert torch.equal(model(inputs), unrounded)
    assert len(graphs) == 2


def test_a_whole_compiled_model(graphs):
    model = seeded(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model)
    inputs = torch.randn(3, 16)
    unrounded = compiled(inputs)
    rounded(plain)
    training = rounded(compiled)
    assert training.layers == 2
    assert torch.equal(compiled(inputs), plain(inputs))
    training.remove()
    assert torch.equal(compiled(inputs), unrounded)


def test_the_reported_error_is_the_change_of_the_weights():
    model = seeded(nn.Linear(16, 16), Conv1D(32, 16))
    training = rounded(model, "int8")
    errors = training.errors()
    matrix = model[1].weight.detach().t()
    change = round_weight(matrix.bfloat16(), "int8").float() - matrix
    # Expanded in float32, a rounded value is not rounded once more to bfloat16.
    assert errors["1.weight"] == pytest.approx(float(change.norm() / matrix.norm()), rel=0.2)
    assert errors["1.weight"] < 0.02
    assert min(errors["0.weight"], errors["1.weight"]) <= errors[""] <= max(errors["0.weight"], errors["1.weight"])
    assert "2 layers trained for int8" in training.summary()


def test_settings():
    with pytest.raises(ValueError, match="'bf16' is no form of 8 bits; use one of fp8_e4m3, int8"):
        RoundedTraining("bf16", 0, inputs=True)
    with pytest.raises(ValueError, match="start=1.5 must be a step"):
        RoundedTraining("int8", 1.5, inputs=True)
    training = RoundedTraining("int8", 0.5, inputs=True)
    training.prepare(40)
    assert training.start_step == 20
    with pytest.raises(ValueError, match="start=0.5 is a fraction of a run whose length is not known"):
        training.prepare(float("inf"))
    with pytest.raises(ValueError, match="start=40 is step 40 of a run of 40: no step would see"):
        RoundedTraining("int8", 40, inputs=True).prepare(40)
    with pytest.raises(ValueError, match="no weight of the model is 2:4"):
        sparse_weights(nn.Linear(16, 16))


def test_nothing_begins_before_the_freeze_or_the_start():
    model = seeded(nn.Linear(16, 16))
    training = RoundedTraining("int8", 3, inputs=True)
    training.prepare(10)
    weights = sparse_weights(model)
    assert not training.update(model, weights, 2, frozen=True)
    assert not training.update(model, weights, 3, frozen=False)
    assert training.layers == 0
    assert isinstance(model[0].forward, MethodType)
    assert "forward" not in vars(model[0])
    assert training.update(model, weights, 3, frozen=True)
    assert not training.update(model, weights, 4, frozen=True)
