"""Masked conjugate gradients: the least-squares solution of every row, on well and badly scaled inputs."""

from __future__ import annotations

import pytest
import torch
from correlated_layer import layer

from prox24_lightning.mask import mask_24
from prox24_lightning.solvers.loss import local_loss
from prox24_lightning.solvers.masked_cg import masked_cg


def excess(weight, hessian, **arguments):
    """Loss over that of the solution after very many steps, minus 1."""
    mask = mask_24(weight)
    best = masked_cg(weight, weight, hessian, mask, steps=5000, tolerance=0.0)
    found = masked_cg(weight, weight, hessian, mask, **arguments)
    return float(local_loss(found, weight, hessian) / local_loss(best, weight, hessian)) - 1


def test_every_row_reaches_its_least_squares_solution():
    weight, hessian = layer(8, 16, 0.9)
    mask = mask_24(weight)
    found = masked_cg(weight, weight, hessian, mask, steps=200, tolerance=0.0, damping=0.0)
    for row, support in enumerate(mask):
        best = torch.linalg.solve(hessian[support][:, support], (hessian @ weight[row])[support])
        torch.testing.assert_close(found[row, support], best, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_the_defaults_do_not_stop_before_the_loss_has_converged(correlation):
    """On 128 inputs of 100 tokens ten steps leave more than one per cent."""
    weight, hessian = layer(16, 128, correlation)
    assert excess(weight, hessian, steps=10) > 1e-2
    assert excess(weight, hessian) < 1e-4


def test_inputs_of_unlike_size_cost_no_more_steps():
    """Without the preconditioner ten steps leave 18 %."""
    weight, hessian = layer(16, 64, 0.5)
    scale = torch.logspace(0, 2.5, 64, dtype=torch.float64)[
        torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ]
    assert excess(weight, hessian * scale * scale.unsqueeze(1), steps=10) < 1e-3


def test_a_loose_tolerance_costs_no_more_than_it_promises():
    weight, hessian = layer(8, 16, 0.9)
    assert excess(weight, hessian, steps=10_000, tolerance=1e-3) < 1e-2


def test_steps_after_convergence_stay_finite():
    weight, hessian = (tensor.float() for tensor in layer(32, 16, 0.9))
    mask = mask_24(weight)
    weight = weight * mask
    found = masked_cg(weight + 0.1 * mask, weight, hessian, mask, steps=400, tolerance=0.0)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
