"""The short path of ADMM fits rho and its steps to the layer's inputs; training takes it for convolutions."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from correlated_layer import layer
from torch import nn

from prox24_lightning.mask import is_24
from prox24_lightning.schedules import Exponential
from prox24_lightning.solvers.admm import PATHS, Path, fitted_path, typical_curvature
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.layer import solve
from prox24_lightning.sparsify.strategies.progressive.calibration import SolveSettings
from prox24_lightning.utils.long_work import watched


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_loss_is_nearly_that_of_the_full_path(correlation):
    weight, hessian = layer(24, 48, correlation)
    full, short = (solve(weight, hessian, SolverConfig(path=path)) for path in ("full", "short"))
    assert is_24(short.weight)
    assert short.refined_loss < 1.01 * full.refined_loss
    assert short.refined_loss < solve(weight, hessian, SolverConfig(steps=10)).refined_loss


def test_it_takes_its_own_steps_and_levels():
    weight, hessian = layer(8, 16, 0.5)
    pieces = []
    with watched(pieces.append):
        solve(weight, hessian, SolverConfig(path="short", refine=None))
    assert len(pieces) == fitted_path(PATHS["short"], hessian, 1e-3).steps
    pieces.clear()
    with watched(pieces.append):
        solve(weight, hessian, SolverConfig(path="short", steps=20, refine=None))
    assert len(pieces) == 20
    assert SolverConfig().method_steps == PATHS["full"].steps == 200


def test_a_path_belongs_to_admm():
    with pytest.raises(ValueError, match="path='short' belongs to method='prox', not to 'wanda'"):
        SolverConfig("wanda", path="short")
    with pytest.raises(ValueError, match="path='long' is unknown; use one of full, short"):
        SolverConfig(path="long")


@pytest.mark.parametrize(
    "module, prox_steps, path",
    [
        (nn.Conv2d(4, 4, 3), None, "short"),
        (nn.Conv1d(4, 4, 3), None, "short"),
        (nn.Conv2d(4, 4, 3), 200, "full"),
        (nn.Linear(4, 4), None, "full"),
    ],
)
def test_training_takes_it_for_convolutions(module, prox_steps, path):
    config = SolveSettings(8, 0.5, 96, True, prox_steps).solver(module)
    assert (config.path, config.steps) == (path, prox_steps)
    assert (config.refine_steps, config.tolerance) == (300, 1e-4)


def falling(inputs, power):
    """A Hessian whose eigenvalues fall as that power of their number, as those of neighbouring pixels do."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64, generator=generator))[0]
    return basis * torch.arange(1, inputs + 1, dtype=torch.float64) ** -power @ basis.T


def test_the_typical_curvature_is_the_geometric_mean_of_the_eigenvalues():
    hessian = falling(32, 1.0)
    hessian /= hessian.diagonal().sqrt() * hessian.diagonal().sqrt()[:, None]
    expected = float((torch.linalg.eigvalsh(hessian) + 1e-3).log().mean().exp())
    units = torch.logspace(-1, 1, 32, dtype=torch.float64)
    assert typical_curvature(hessian * units * units[:, None], 1e-3) == pytest.approx(expected, rel=1e-2)
    assert typical_curvature(3 * torch.eye(8), 1e-3) == pytest.approx(1.001)
    assert typical_curvature(torch.ones(64, 64), 1e-3) < 2e-3


def test_inputs_that_never_fire_do_not_count():
    hessian = torch.zeros(64, 64, dtype=torch.float64)
    hessian[:32, :32] = falling(32, 1.0)
    assert typical_curvature(hessian, 1e-3) == pytest.approx(typical_curvature(hessian[:32, :32], 1e-3), rel=1e-2)
    found = solve(torch.randn(4, 64), torch.zeros(64, 64), SolverConfig(path="short"))
    assert is_24(found.weight)
    assert found.refined_loss == 0


@pytest.mark.parametrize(("power", "steps"), [(0.0, 150), (2.0, 108), (3.0, 60)])
def test_correlated_inputs_take_fewer_steps_and_a_smaller_rho(power, steps):
    hessian = falling(64, power)
    path, curvature = fitted_path(PATHS["short"], hessian, 1e-3), typical_curvature(hessian, 1e-3)
    assert path.steps == pytest.approx(steps, abs=2)
    assert (path.rhos.start, path.rhos.end) == pytest.approx((0.3 * curvature, 3 * curvature))
    assert (path.levels, path.strengths) == (PATHS["short"].levels, PATHS["short"].strengths)


def test_a_fitted_rho_ends_closer_to_the_optimum_than_one_of_the_mean_square():
    """60 steps against the 150 of a rho from 0.03 to 1."""
    weight = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = falling(64, 3.0)
    fitted = solve(weight, hessian, SolverConfig(path="short"))
    with patch.dict(PATHS, {"short": Path(150, 15, Exponential(0.1, 100.0), Exponential(0.0316, 1.0))}):
        mean_square = solve(weight, hessian, SolverConfig(path="short"))
    assert fitted.refined_loss < 0.9 * mean_square.refined_loss
