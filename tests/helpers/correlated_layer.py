"""A layer with correlated inputs, for the tests of the solvers."""

from __future__ import annotations

import torch


def layer(outputs, inputs, correlation, seed=0):
    """Weight (outputs, inputs) and the Hessian of 100 inputs that share a common part; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    common = torch.randn(100, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(100, inputs, generator=generator, dtype=torch.float64)
    x = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return weight, x.T @ x / 100
