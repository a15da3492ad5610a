"""The inverses that a splitting with a growing penalty needs, one from the last."""

from __future__ import annotations

import itertools

import pytest
import torch

from prox24_lightning.solvers.admm import RHOS as RHO_SCHEDULE
from prox24_lightning.solvers.linear_algebra.inverses import newton_inverse, shifted_inverses

RHOS = [RHO_SCHEDULE(level / 19) for level in range(20)]


def correlated(size: int) -> torch.Tensor:
    """The Hessian of strongly correlated inputs, with a unit diagonal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * size, size, generator=generator) + 2 * torch.randn(4 * size, 1, generator=generator)
    hessian = x.T @ x / len(x)
    scale = hessian.diagonal().rsqrt()
    return hessian * scale * scale[:, None]


def distance(found: torch.Tensor, hessian: torch.Tensor, rho: float) -> float:
    exact = torch.linalg.inv(hessian.double() + rho * torch.eye(len(hessian), dtype=torch.float64))
    return float(torch.linalg.matrix_norm(found.cpu() - exact) / torch.linalg.matrix_norm(exact))


def test_each_newton_inverse_leads_to_the_next():
    hessian = correlated(96)
    found = torch.linalg.inv(hessian + RHOS[0] * torch.eye(96))
    for last, rho in itertools.pairwise(RHOS):
        found = newton_inverse(hessian + rho * torch.eye(96), found * (2 / (1 + rho / last)))
        assert distance(found, hessian, rho) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rhos", [RHOS, [0.01, 0.1, 1.0], [0.3]])
def test_all_are_inverses(device, rhos):
    hessian = correlated(192)
    for rho, found in zip(rhos, shifted_inverses(hessian.to(device), rhos), strict=True):
        assert distance(found, hessian, rho) < 2e-5


@pytest.mark.gpu
def test_the_gpu_takes_newton_steps_only_where_the_first_factor_exists(monkeypatch):
    factors = []
    monkeypatch.setattr(
        "prox24_lightning.solvers.linear_algebra.inverses.cholesky",
        lambda matrix, name: factors.append(name) or torch.linalg.cholesky(matrix + 3 * torch.eye(64, device="cuda")),
    )
    hessian = correlated(64).cuda()
    assert len(list(shifted_inverses(hessian, RHOS))) == len(RHOS)
    assert len(factors) == 1
    factors.clear()
    assert len(list(shifted_inverses(hessian - 2 * torch.eye(64, device="cuda"), RHOS))) == len(RHOS)
    assert len(factors) == len(RHOS)
