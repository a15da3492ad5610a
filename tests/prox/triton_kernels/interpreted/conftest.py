"""Tests of the Triton kernels on a CPU: ``TRITON_INTERPRET=1 pytest tests/prox/triton_kernels/interpreted``."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from brute import hard_groups

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _infinities_are_expected():
    with np.errstate(all="ignore"):  # the interpreter computes with numpy
        yield


@pytest.fixture
def groups() -> torch.Tensor:
    """1100 groups of all kinds: ties, zeros, large and small entries."""
    return hard_groups(1100, seed=21).float()


@pytest.fixture
def many(groups, monkeypatch):
    """Weights of three kinds, their dimensions, scales and strengths; any weight goes with the others."""
    from prox24_lightning.prox import multi_tensor

    monkeypatch.setattr(multi_tensor, "fits_multi_tensor", lambda weight: True)
    y = groups[:300].clamp(-30, 30)
    weights = [y[:128].reshape(8, 64).clone(), y[128:192].reshape(32, 8).clone(), y[192:].reshape(-1, 8).clone()]
    return weights, [1, 0, 1], [torch.linspace(0.3, 3, 64), None, None], torch.tensor([0.3, 0.7, 1.1])
