from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.selection import select_weights


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 6)
        self.odd = nn.Linear(6, 8)
        self.conv1 = nn.Conv1d(8, 4, 3)
        self.conv2 = nn.Conv2d(16, 4, 3, groups=2)
        self.conv3 = nn.Conv3d(4, 4, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.transposed = nn.ConvTranspose2d(8, 8, 2)
        self.complex = nn.Linear(8, 8, dtype=torch.complex64)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.classifier = nn.Linear(8, 4)
        self.tied = nn.Linear(8, 12)
        self.tied.weight = self.embed.weight


def decisions(selection):
    return {w.name: w.dim for w in selection.chosen}, {w.name: w.reason for w in selection.skipped}


def test_what_fits_is_chosen_with_its_dimension_and_the_rest_has_a_reason():
    chosen, skipped = decisions(select_weights(Zoo()))
    assert chosen == {
        "linear.weight": 1,
        "conv1.weight": 1,
        "conv2.weight": 1,
        "conv3.weight": 1,
        "attention.in_proj_weight": 1,
        "attention.out_proj.weight": 1,
    }
    assert "embedding" in skipped["embed.weight"]
    assert "input size 6 does not divide by 4" in skipped["odd.weight"]
    assert "depthwise" in skipped["depthwise.weight"]
    assert "transposed" in skipped["transposed.weight"]
    assert "complex numbers" in skipped["complex.weight"]
    assert "recurrent" in skipped["rnn.weight_ih_l0"]
    assert "requires_grad" in skipped["frozen.weight"]
    assert skipped["classifier.weight"] == "output head"


def test_column_geometry_groups_along_the_outputs():
    chosen, skipped = decisions(select_weights(Zoo(), geometry="column"))
    assert chosen["odd.weight"] == 0
    assert "output size 6 does not divide by 4" in skipped["linear.weight"]


def test_block_geometry_needs_both_sides_and_says_which_is_missing():
    chosen, skipped = decisions(select_weights(Zoo(), geometry="block"))
    assert chosen == {
        "conv1.weight": (0, 1),
        "conv3.weight": (0, 1),
        "attention.in_proj_weight": (0, 1),
        "attention.out_proj.weight": (0, 1),
    }
    assert "output size 6 does not divide by 4" in skipped["linear.weight"]
    assert "input size 6 does not divide by 4" in skipped["odd.weight"]
    assert "grouped convolution: 2 outputs a group" in skipped["conv2.weight"]
    with pytest.raises(ValueError, match=r"target 'odd.weight' of shape \(8, 6\) cannot be 2:4: input size 6"):
        select_weights(Zoo(), geometry="block", targets=["odd"])


@pytest.mark.parametrize("geometry, groups, matrix_dim", [("row", 16, -1), ("column", 16, 0), ("block", 32, (0, 1))])
def test_a_weight_knows_its_groups_and_where_they_lie_in_its_matrix(geometry, groups, matrix_dim):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    weight = select_weights(model, geometry=geometry, targets=["*.attn.c_proj"]).chosen[0]
    assert (weight.groups, weight.matrix_dim) == (4 * groups, matrix_dim)
    assert weight.dim == {"row": 0, "column": 1, "block": (1, 0)}[geometry], "stored as (in, out)"


def test_targets_and_skip_match_names_and_types():
    chosen, skipped = decisions(select_weights(Zoo(), targets=["Conv*d", "linear"], skip=["conv1"]))
    assert set(chosen) == {"linear.weight", "conv2.weight", "conv3.weight"}
    assert skipped["conv1.weight"] == "skip='conv1'"
    assert skipped["attention.in_proj_weight"] == "not among the targets"


def test_a_head_or_a_tied_weight_is_taken_when_named():
    chosen, _ = decisions(select_weights(Zoo(), targets=["classifier"]))
    assert set(chosen) == {"classifier.weight"}


def test_weights_tied_to_an_embedding_stay_dense():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    chosen, skipped = decisions(select_weights(model))
    assert set(chosen) == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(chosen.values()) == {0}, "Hugging Face's Conv1D stores (in, out)"
    assert "embedding" in skipped["transformer.wte.weight"]


def test_weights_shared_by_two_layers_stay_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    chosen, skipped = decisions(select_weights(model))
    assert set(chosen) == {"2.weight"}
    assert skipped["0.weight"] == "tied: shared by 0 and 1"


def test_the_head_of_a_hugging_face_model_is_found_when_it_is_not_tied():
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8, tie_word_embeddings=False)
    _, skipped = decisions(select_weights(GPT2LMHeadModel(config)))
    assert skipped["lm_head.weight"] == "output head"


def test_a_parametrized_weight_is_skipped():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)))
    chosen, _ = decisions(select_weights(model))
    assert set(chosen) == {"0.weight"}


def test_compiled_modules_keep_their_names():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0] = torch.compile(model[0], backend="eager")
    assert [w.name for w in select_weights(model)] == ["0.weight"]
    assert clean_name("a._orig_mod.b") == "a.b"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"geometry": "diagonal"}, "geometry='diagonal' is unknown"),
        ({"targets": ["linaer"]}, "targets pattern 'linaer' matches no weight"),
        ({"skip": ["nothing.*"]}, r"skip pattern 'nothing\.\*' matches no weight"),
        ({"targets": ["odd"]}, r"target 'odd.weight' of shape \(8, 6\) cannot be 2:4"),
    ],
)
def test_bad_selections_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        select_weights(Zoo(), **arguments)


@pytest.mark.parametrize("model", [nn.Sequential(nn.LazyLinear(4)), nn.Sequential(nn.Linear(4, 4, device="meta"))])
def test_weights_without_values_are_refused(model):
    with pytest.raises(ValueError, match="has no values yet"):
        select_weights(model)


class OwnLinear(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))


def test_a_large_part_of_an_unknown_kind_is_named_in_a_warning():
    selection = select_weights(nn.Sequential(nn.Linear(8, 8), OwnLinear(8), OwnLinear(8)))
    assert selection.warning() == (
        "1.weight and 1 more stay dense, 67 % of the weights: OwnLinear is neither a linear layer nor a convolution"
    )
    assert select_weights(nn.Sequential(nn.Linear(32, 32), OwnLinear(4))).warning() is None
