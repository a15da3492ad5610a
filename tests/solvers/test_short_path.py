"""The short path of ADMM leaves out its first quarter, not its result; training takes it for convolutions."""

from __future__ import annotations

import math

import pytest
from correlated_layer import layer
from torch import nn

from prox24_lightning.mask import is_24
from prox24_lightning.solvers.admm import PATHS
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
    assert len(pieces) == PATHS["short"].steps == 150
    assert SolverConfig(path="short", steps=20).method_steps == 20
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


def test_numbers_of_the_paths():
    """The short path is the rest of the full one: where strength is the same, so is rho."""
    full, short = PATHS["full"], PATHS["short"]
    for progress in (0.0, 1.0):
        strength, rho = short.strengths(progress), short.rhos(progress)
        place = math.log(strength / full.strengths(0.0)) / math.log(full.strengths(1.0) / full.strengths(0.0))
        assert 0.2 < place < 1.001
        assert rho == pytest.approx(full.rhos(place), rel=1e-2)
