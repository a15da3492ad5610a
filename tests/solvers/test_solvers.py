import logging

import pytest
import torch

from prox24_lightning.mask import is_24, mask_24, zeros_per_group
from prox24_lightning.solvers import solve_layer
from prox24_lightning.solvers.linear_algebra.cholesky import cholesky
from prox24_lightning.solvers.loss import local_loss, regularized
from prox24_lightning.solvers.proximal_gradient import largest_eigenvalue
from prox24_lightning.solvers.sparsegpt import sparsegpt

METHODS = ["magnitude", "wanda", "sparsegpt", "prox", "prox_gradient"]


def layer(outputs=8, inputs=16, tokens=200, correlation=0.9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=dtype)
    common = torch.randn(tokens, 1, generator=generator, dtype=dtype)
    own = torch.randn(tokens, inputs, generator=generator, dtype=dtype)
    x = (correlation**0.5 * common + (1 - correlation) ** 0.5 * own) * torch.linspace(0.3, 3, inputs, dtype=dtype)
    return weight, x.T @ x / tokens


def test_wanda_keeps_the_largest_magnitude_times_rms_input():
    # rms inputs 1, 2, 3, 4: scores 4, 6, 6.3, 4.4 and 3, 2, 3.3, 8.
    weight = torch.tensor([[4.0, -3.0, 2.1, 1.1], [3.0, 1.0, -1.1, 2.0]])
    found = solve_layer(weight, torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0])), method="wanda", refine=None)
    assert found.weight.tolist() == [[0.0, -3.0, pytest.approx(2.1), 0.0], [0.0, 0.0, pytest.approx(-1.1), 2.0]]


def published_sparsegpt(weight, hessian, damping=0.01):
    """Optimal brain surgeon, one column at a time, the inverse of the remaining H computed anew for every column."""
    weight, hessian = weight.clone(), hessian.clone()
    size = len(hessian)
    hessian += damping * hessian.diagonal().mean() * torch.eye(size, dtype=hessian.dtype)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(size):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % 4 == 0:
            # The published score divides by the Cholesky factor's diagonal, which for column j + k is the inverse of
            # H restricted to the columns from j + k on.
            scale = torch.stack([torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + 4)])
            score = weight[:, j : j + 4] ** 2 / scale
            keep = score.topk(2, dim=1).indices
            mask[:, j : j + 4].scatter_(1, keep, True)
        wrong = torch.where(mask[:, j], 0.0, weight[:, j])
        weight[:, j:] -= torch.outer(wrong / inverse[0, 0], inverse[0])
    return weight * mask, mask


@pytest.mark.parametrize("block", [4, 8, 128])
def test_sparsegpt_agrees_with_explicit_inverses(block):
    weight, hessian = layer()
    found, mask = sparsegpt(weight, hessian, block=block)
    wanted, wanted_mask = published_sparsegpt(weight, hessian)
    assert torch.equal(mask, wanted_mask)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_cholesky_takes_more_damping_where_the_first_try_fails(caplog):
    vector = torch.arange(1.0, 9.0).unsqueeze(1)
    with caplog.at_level(logging.INFO):
        lower = cholesky(vector @ vector.T, name="block.3.fc")
    assert torch.isfinite(lower).all()
    assert "block.3.fc: the Cholesky factor needed damping" in caplog.text


def test_cholesky_of_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match=r"fc1: the Hessian has no Cholesky factor even with damping"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0])), name="fc1")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [-1, 0])
def test_every_method_gives_24_and_refinement_lowers_its_loss(method, dim):
    weight, hessian = layer(outputs=12, inputs=32)
    plain = solve_layer(weight, hessian, method=method, refine=None, dim=dim, steps=40)
    refined = solve_layer(weight, hessian, method=method, dim=dim, steps=40)
    assert bool((zeros_per_group(refined.weight, dim=dim) >= 2).all())
    assert bool((refined.mask.unflatten(dim, (-1, 4)).sum(1 if dim == 0 else -1) == 2).all())
    assert torch.equal(plain.mask, refined.mask)
    assert refined.refined_loss <= plain.loss * (1 + 1e-6)
    lost = local_loss(refined.weight, weight, hessian) / local_loss(0 * weight, weight, hessian)
    assert refined.refined_loss == pytest.approx(float(lost))


def test_prox_ends_below_sparsegpt_and_wanda():
    weight, hessian = layer(outputs=32, inputs=64, tokens=400)
    losses = {method: solve_layer(weight, hessian, method=method).refined_loss for method in METHODS}
    assert losses["prox"] < 0.95 * losses["sparsegpt"]
    assert losses["prox"] < losses["prox_gradient"] < losses["wanda"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_what_they_are_stacked_with(method):
    weight, hessian = layer(outputs=8, inputs=16)
    whole = solve_layer(weight, hessian, method=method, steps=30, tolerance=0.0, refine_steps=60)
    alone = solve_layer(weight[2:5], hessian, method=method, steps=30, tolerance=0.0, refine_steps=60)
    part = whole.rows(2, 5)
    torch.testing.assert_close(part.weight, alone.weight, rtol=1e-6, atol=1e-8)
    assert part.loss == pytest.approx(alone.loss)


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_hessian_does_not_matter(method):
    weight, hessian = layer()
    one = solve_layer(weight, hessian, method=method, steps=30)
    two = solve_layer(weight, 1000 * hessian, method=method, steps=30)
    assert torch.equal(one.mask, two.mask)


def test_prox_needs_no_final_projection():
    weight, hessian = layer(outputs=32, inputs=32)
    assert solve_layer(weight, hessian, method="prox", refine=None).reached == 1.0
    assert solve_layer(weight, hessian, method="wanda", refine=None).reached < 0.1


def test_uncorrelated_inputs_leave_nothing_to_gain_over_wanda():
    weight, _ = layer()
    hessian = torch.diag(torch.linspace(0.5, 2, 16, dtype=torch.float64))
    wanda = solve_layer(weight, hessian, method="wanda", refine=None)
    assert torch.equal(solve_layer(weight, hessian, method="prox").mask, wanda.mask)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_never_fire_mean_magnitude(method):
    weight, _ = layer(dtype=torch.float32)
    found = solve_layer(weight, torch.zeros(16, 16), method=method, steps=30)
    assert torch.equal(found.mask, mask_24(weight))
    assert found.loss == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs_still_give_a_finite_24_weight(method, tokens):
    weight, hessian = layer(inputs=32, tokens=tokens, dtype=torch.float32)
    found = solve_layer(weight, hessian, method=method, steps=30)
    assert torch.isfinite(found.weight).all()
    assert is_24(found.weight)
    # With one token every loss is rounding.
    assert found.refined_loss <= found.loss * (1 + 1e-4) + 1e-6


def test_one_strong_input_does_not_drown_the_others():
    _, hessian = layer(dtype=torch.float32)
    scale = torch.ones(16)
    scale[5] = 1e3
    hessian = hessian * scale * scale.unsqueeze(1)
    shrunk = regularized(hessian, 1e-3).diagonal() / hessian.diagonal()
    assert shrunk[0] < 1.5


def test_largest_eigenvalue_is_an_upper_estimate_within_five_percent():
    _, hessian = layer(inputs=32)
    true = torch.linalg.eigvalsh(hessian)[-1]
    assert true <= largest_eigenvalue(hessian) <= 1.05 * true


BAD = [
    ({"method": "best"}, "method='best' is unknown; use one of magnitude, wanda"),
    ({"refine": "adam"}, "refine='adam' is unknown; use one of masked_gradient, None"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    (
        {"weight": torch.ones(4, 8, dtype=torch.complex64)},
        r"model.fc: the solvers work on real numbers, got a weight of",
    ),
    ({"weight": torch.full((4, 8), torch.nan)}, r"model.fc: the weight holds values that are not finite"),
    ({"hessian": torch.full((8, 8), torch.inf)}, r"model.fc: the layer's inputs hold values that are not finite"),
    (
        {"hessian": torch.eye(4)},
        r"model.fc: a Hessian of shape \(4, 4\) does not fit a weight of shape \(4, 8\)",
    ),
    ({"weight": torch.zeros(8)}, r"model.fc: the layer-wise solver takes a matrix, got a weight of shape \(8,\)"),
    ({"weight": torch.zeros(4, 6), "hessian": torch.eye(6)}, "has size 6, which does not divide by 4"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_refused_by_name(changes, message):
    arguments = {"weight": torch.ones(4, 8), "hessian": torch.eye(8), "name": "model.fc"} | changes
    with pytest.raises(ValueError, match=message):
        solve_layer(**arguments)
