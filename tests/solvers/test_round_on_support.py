"""Rounding on a mask: never worse than plain rounding, the packed file's own values, and what is refused."""

import pytest
import torch
from correlated_layer import layer

from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.mask import is_24
from prox24_lightning.oneshot.config import PruneConfig
from prox24_lightning.solvers import SolverConfig, solve_layer
from prox24_lightning.solvers.config import ROUNDING_DAMPING
from prox24_lightning.solvers.loss import local_loss, regularized
from prox24_lightning.solvers.rounding import round_on_support, round_plainly
from prox24_lightning.weights.rounding import round_weight

FORMS = ("fp8_e4m3", "int8")


def pruned(outputs=24, inputs=64, correlation=0.7, seed=0):
    weight, hessian = layer(outputs, inputs, correlation, seed)
    weight, hessian = weight.float(), hessian.float()
    found = solve_layer(weight, hessian, method="sparsegpt")
    return weight, hessian, found.weight, found.mask


@pytest.mark.parametrize("form", FORMS)
def test_every_sweep_lowers_the_loss(form):
    _, hessian, weight, mask = pruned()
    losses = [
        float(
            local_loss(
                round_on_support(weight, hessian, mask, form, sweeps=n, damping=1e-3),
                weight,
                regularized(hessian, 1e-3),
            )
        )
        for n in range(4)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.6 * losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_no_sweep_is_plain_rounding(form):
    _, hessian, weight, mask = pruned()
    weight = weight.bfloat16().float()
    rounded = round_on_support(weight, hessian, mask, form, sweeps=0)
    assert torch.equal(rounded, round_weight(weight, form))


def test_two_entries_by_hand():
    """Equal inputs: 10.4 + 10.4 is 20.8, and rounded 10 + 10; the second entry makes up for the first."""
    weight = torch.tensor([[127.0, 10.4, 0.0, 0.0, 10.4, 0.0, 0.0, 0.0]])
    hessian = torch.zeros(8, 8)
    hessian[0, 0] = 1
    hessian[1::3, 1::3] = 1
    rounded = round_on_support(weight, hessian, weight != 0, "int8", damping=1e-6)
    assert rounded[0, [0, 1, 4]].tolist() == [127.0, 11.0, 10.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [7, 64])
def test_packing_changes_nothing_more(form, dtype, block):
    _, hessian, weight, mask = pruned(seed=3)
    weight[5] = 0
    weight[6] *= 1e-3
    rounded = round_on_support(weight, hessian, mask, form, block=block).to(dtype)
    assert torch.equal(rounded[5], torch.zeros_like(rounded[5]))
    assert is_24(rounded)
    assert torch.equal(unpack_24(pack_24(rounded, form=form)), rounded)


def test_the_size_of_a_block_of_columns_makes_no_difference():
    _, hessian, weight, mask = (part.double() if part.dtype == torch.float32 else part for part in pruned())
    found = [round_on_support(weight, hessian, mask, "int8", block=block) for block in (1, 16, 64)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", FORMS)
def test_solve_layer_rounds_at_the_end_and_reports_it(form):
    dense, hessian, *_ = pruned()
    plain, rounded = (solve_layer(dense, hessian, method="wanda", weights=weights) for weights in (None, form))
    assert plain.rounded_loss is None
    assert plain.refined_loss == rounded.refined_loss < rounded.rounded_loss < 1.2 * plain.refined_loss
    assert torch.equal(round_weight(rounded.weight, form), rounded.weight)


def test_keep_rounds_a_weight_that_is_24():
    dense, hessian, weight, mask = pruned()
    found = solve_layer(weight, hessian, method="keep", weights="fp8_e4m3")
    assert torch.equal(found.mask | (weight == 0), torch.ones_like(mask))
    assert found.loss == 0
    plain = float(local_loss(round_weight(weight, "fp8_e4m3"), weight, hessian))
    assert float(found.rounded_losses.sum()) < plain
    with pytest.raises(ValueError, match="up: method='keep' keeps the zeros of a 2:4 weight"):
        solve_layer(dense, hessian, method="keep", name="up")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [24, 64, 256])
def test_rounding_holds_on_other_tokens_than_those_of_the_calibration(form, tokens):
    _, hessian, weight, _ = pruned()
    root = torch.linalg.cholesky(hessian)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)) @ root.T
    found = solve_layer(weight, x.T @ x / tokens, method="keep", weights=form)
    plain = float(local_loss(round_weight(weight, form), weight, hessian))
    assert float(local_loss(found.weight, weight, hessian)) < 0.9 * plain


def test_no_row_is_worse_than_plain_rounding_on_the_calibration_tokens(monkeypatch):
    _, hessian, weight, _ = pruned()
    monkeypatch.setattr("prox24_lightning.solvers.layer.round_on_support", lambda weight, *_, **__: 1.1 * weight)
    found = solve_layer(weight, hessian, method="keep", weights="int8")
    assert torch.equal(found.weight, round_plainly(weight, "int8"))


def test_what_cannot_be_rounded_is_refused():
    dense, hessian, *_ = pruned()
    with pytest.raises(ValueError, match="up: weights='int8' takes groups along the inputs"):
        solve_layer(dense, hessian, dim=0, weights="int8", name="up")
    with pytest.raises(ValueError, match="weights='int4' is unknown; use one of fp8_e4m3, int8, None"):
        solve_layer(dense, hessian, weights="int4")
    with pytest.raises(ValueError, match="weights='int8' with geometry='column'"):
        PruneConfig(SolverConfig(weights="int8"), geometry="column")
    with pytest.raises(ValueError, match="leave reorder_inputs=True out"):
        PruneConfig(SolverConfig("keep"), reorder_inputs=True)
    with pytest.raises(ValueError, match=r"method='keep' leaves no layer dense: leave budget=0\.1 out"):
        PruneConfig(SolverConfig("keep"), budget=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_captured_steps_lower_the_loss_as_the_cpu_does(form):
    _, hessian, weight, mask = pruned(inputs=152)  # two blocks of 64 columns and a narrower one
    losses = []
    for device in ("cpu", "cuda"):
        given = [tensor.to(device) for tensor in (weight, hessian, mask)]
        found = round_on_support(*given, form).cpu()
        assert not found[~mask].any()
        losses.append(float(local_loss(found, weight, regularized(hessian, ROUNDING_DAMPING))))
    plain = float(
        local_loss(
            round_on_support(weight, hessian, mask, form, sweeps=0), weight, regularized(hessian, ROUNDING_DAMPING)
        )
    )
    assert losses[1] < plain
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
