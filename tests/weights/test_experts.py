"""Experts in one 3-D parameter: each expert's matrix has its groups along its own inputs."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from experts import EXPERTS, INNER, WIDTH, Experts, MixtureModel
from torch import nn

from prox24_lightning.weights.experts import expert_input_dim, expert_matrices, from_expert_matrices
from prox24_lightning.weights.selection import select_weights


@pytest.mark.parametrize("transposed, inputs", [(False, 2), (True, 1)])
@pytest.mark.parametrize("geometry", ["row", "column", "block"])
def test_groups_lie_in_each_experts_matrix(transposed, inputs, geometry):
    chosen = {w.name: w for w in select_weights(MixtureModel(1, transposed), geometry=geometry)}
    outputs = 3 - inputs
    for name in ("blocks.0.experts.gate_up_proj", "blocks.0.experts.down_proj"):
        assert chosen[name].dim == {"row": inputs, "column": outputs, "block": (outputs, inputs)}[geometry]
        assert chosen[name].is_experts
        assert chosen[name].input_dim == inputs
    assert not chosen["blocks.0.proj.weight"].is_experts


class Attributes(nn.Module):
    """Says nothing but its sizes."""

    def __init__(self, *, hidden: int = 16, inner: int = 8, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = 4, hidden, inner
        up, down = (4, inner, hidden), (4, hidden, inner)
        if transposed:
            up, down = (4, hidden, inner), (4, inner, hidden)
        self.w1, self.w2 = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))


@pytest.mark.parametrize("transposed, inputs", [(False, 2), (True, 1)])
def test_the_side_of_the_inputs_follows_from_the_modules_sizes(transposed, inputs):
    module = Attributes(transposed=transposed)
    assert [expert_input_dim(module, name) for name in ("w1", "w2")] == [inputs, inputs]


@pytest.mark.parametrize("transposed, inputs", [(False, 2), (True, 1)])
def test_the_side_of_the_inputs_follows_from_a_gated_pair(transposed, inputs):
    module = Experts(transposed)
    del module.is_transposed, module.hidden_dim, module.intermediate_dim
    assert [expert_input_dim(module, name) for name in ("gate_up_proj", "down_proj")] == [inputs, inputs]


def test_experts_whose_inputs_nobody_knows_stay_dense_and_are_named_with_their_share():
    model = nn.Sequential(nn.Linear(8, 8), Attributes(hidden=8, inner=8))
    selection = select_weights(model)
    assert [weight.name for weight in selection] == ["0.weight"]
    assert "nothing tells which side of w1 is its input" in selection.skipped[0].reason
    warning = selection.warning()
    assert warning is not None
    assert warning.startswith("1.w1 and 1 more stay dense, 89 % of the weights: experts of Attributes")
    assert select_weights(MixtureModel()).warning() is None
    assert select_weights(model, skip=["1.*"]).warning() is None, "the user's own choice"


def test_sizes_that_are_no_numbers_are_no_obstacle():
    module = Attributes()
    module.num_experts, module.hidden_size = [4], {"text": 16}
    assert select_weights(nn.Sequential(nn.Linear(8, 8), module)).chosen


def test_sizes_that_do_not_divide_are_named():
    model = nn.Sequential(Attributes(inner=6))
    assert [w.name for w in select_weights(model)] == ["0.w1"]
    assert "input size 6 does not divide by 4" in select_weights(model).skipped[0].reason


def test_a_convolution_is_no_mixture():
    class MoeConv(nn.Conv1d):
        pass

    assert not select_weights(nn.Sequential(MoeConv(8, 8, 3))).chosen[0].is_experts


@pytest.mark.parametrize("dim", [1, 2])
def test_matrices_round_trip(dim):
    parameter = torch.randn(EXPERTS, INNER, WIDTH)
    matrices = expert_matrices(parameter, dim)
    assert matrices.shape == (EXPERTS, INNER, WIDTH) if dim == 2 else (EXPERTS, WIDTH, INNER)
    assert torch.equal(from_expert_matrices(matrices, dim), parameter)


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
MODELS = {
    "Qwen3Moe": dict(SIZES, moe_intermediate_size=8, head_dim=8, num_experts=4, num_experts_per_tok=2),
    "Mixtral": dict(SIZES, num_local_experts=4),
    "GptOss": dict(SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "JetMoe": dict(SIZES, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
}


def mixture_of_transformers(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_transformers_are_taken(name):
    model = mixture_of_transformers(name)
    taken = {weight.name for weight in select_weights(model) if weight.is_experts}
    assert taken == {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    assert taken
