"""Why a layer can or cannot run sparse, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from transformers.pytorch_utils import Conv1D

from prox24_lightning.convert import Target, check_layer, check_model
from prox24_lightning.convert.eligibility import DTYPES, SHAPE_MULTIPLES
from prox24_lightning.mask import mask_24

HOPPER = Target("H", (9, 0), "cusparselt")
AMPERE_CUTLASS = Target("A", (8, 6), "cutlass")


def pruned(layer: nn.Module, dim: int = 1) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(mask_24(layer.weight, dim=dim))
    return layer


def verdict(layer: nn.Module, target: Target | None = HOPPER, dtype: torch.dtype = torch.bfloat16, **arguments):
    return check_layer(layer, name="fc", dtype=dtype, target=target, **arguments)


def test_a_24_linear_layer_runs():
    found = verdict(pruned(nn.Linear(64, 32)))
    assert found.runs
    assert found.shape == (32, 64)
    assert found.bias
    assert found.why == ""


def test_one_violation_is_enough():
    layer = pruned(nn.Linear(64, 32))
    with torch.no_grad():
        layer.weight[7, 20:24] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    found = verdict(layer)
    assert not found.fits
    assert "1 of 512 groups have more than two non-zeros (at (7, 20): 1, 0, 2, 3)" in found.why


def test_a_dense_layer_is_counted_in_short():
    assert verdict(nn.Linear(64, 32)).why == "not 2:4: no group is"


def test_the_first_violations_only():
    layer = pruned(nn.Linear(64, 32))
    with torch.no_grad():
        layer.weight[1:3] = 1.0
    assert verdict(layer).why.count("1, 1, 1, 1") == 3


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(16, 16, 3), "no sparse convolution kernel in torch"),
        (nn.ConvTranspose1d(16, 16, 3), "no sparse convolution kernel in torch"),
        (nn.Embedding(16, 16), "looked up, not multiplied"),
        (nn.MultiheadAttention(16, 2), "packs its projections into one weight"),
        (nn.LSTM(16, 16), "recurrent"),
        (nn.LayerNorm((4, 4)), "LayerNorm is not a linear layer"),
        (nn.Bilinear(4, 4, 4), "Bilinear is not a linear layer"),
        (nn.LazyLinear(16), "no values yet"),
        (nn.Linear(16, 16, device="meta"), "no values yet"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), "parametrized"),
    ],
)
def test_what_is_no_plain_linear_layer_says_why(layer, reason):
    found = verdict(layer)
    assert not found.fits
    assert reason in found.why


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert "Doubled has a forward of its own" in verdict(pruned(Doubled(16, 16))).why
    patched = pruned(nn.Linear(16, 16))
    patched.forward = lambda input: input
    assert "forward of its own" in verdict(patched).why


def test_children_whose_weight_the_parent_reads_stay_dense():
    found = {v.name: v.why for v in check_model(nn.TransformerEncoderLayer(16, 2, 32), target=HOPPER)}
    assert "reads this weight itself" in found["self_attn.out_proj"]
    assert "nn.TransformerEncoderLayer reads this weight itself" in found["linear1"]


def test_a_transposed_layer_is_judged_along_its_inputs():
    layer = pruned(Conv1D(32, 64), dim=0)  # weight (64 in, 32 out)
    found = verdict(layer)
    assert found.runs
    assert found.shape == (32, 64)
    assert "weight.t()" in found.note
    assert not verdict(pruned(Conv1D(32, 64), dim=1)).fits


def test_column_geometry_is_recognised():
    assert "column geometry" in verdict(pruned(nn.Linear(64, 64), dim=0)).why


@pytest.mark.parametrize(
    "target, shape, fits",
    [
        (HOPPER, (16, 16), True),
        (HOPPER, (24, 16), False),
        (HOPPER, (16, 24), False),
        (AMPERE_CUTLASS, (32, 64), True),
        (AMPERE_CUTLASS, (16, 64), False),
        (AMPERE_CUTLASS, (32, 32), False),
        (None, (16, 16), True),
    ],
)
def test_shape_rule_of_the_backend(target, shape, fits):
    found = verdict(pruned(nn.Linear(shape[1], shape[0])), target=target)
    assert found.fits is fits
    assert fits or "to be multiples of" in found.why


@pytest.mark.parametrize(
    "backend, kind",
    [("cusparselt", SparseSemiStructuredTensorCUSPARSELT), ("cutlass", SparseSemiStructuredTensorCUTLASS)],
)
def test_shape_rules_are_torchs_own(backend, kind):
    for dtype in DTYPES:
        rule = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
        assert SHAPE_MULTIPLES[backend] == (rule.sparse_min_rows, rule.sparse_min_cols)


def test_float32_has_no_kernel():
    assert "float32: the sparse kernels take" in verdict(pruned(nn.Linear(16, 16)), dtype=torch.float32).why
    assert "float32" in check_layer(pruned(nn.Linear(16, 16)), target=HOPPER).why, "its own dtype by default"


def test_nan_is_refused():
    layer = pruned(nn.Linear(16, 16))
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    assert "NaN or inf" in verdict(layer).why


@pytest.mark.parametrize(
    "target, reason",
    [
        (None, "no CUDA GPU"),
        (Target("V100", (7, 0), "cusparselt"), "compute capability 7.0: sparse tensor cores need 8.0"),
        (Target("H100", (9, 0), None), "CUTLASS kernels refuse compute capability 9.0"),
    ],
)
def test_machines_that_cannot(target, reason):
    found = verdict(pruned(nn.Linear(16, 16)), target=target)
    assert found.fits
    assert not found.runs
    assert reason in found.why


def test_tied_weights_stay_dense_at_every_owner():
    model = nn.ModuleDict({"embed": nn.Embedding(16, 16), "head": nn.Linear(16, 16, bias=False)})
    model["head"].weight = model["embed"].weight
    pruned(model["head"])
    found = {v.name: v.why for v in check_model(model, target=HOPPER)}
    assert "tied: shares its weight with embed" in found["head"]
    assert "looked up" in found["embed"]


def test_names_are_those_before_compilation():
    model = nn.Sequential(nn.Sequential(pruned(nn.Linear(16, 16))), pruned(nn.Linear(16, 16)))
    model[0] = torch.compile(model[0], backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    found = {v.name: v for v in check_model(model, target=HOPPER)}
    assert list(found) == ["0.0", "1"]
    assert found["0.0"].runs
    assert "compiled by itself" in found["1"].why
