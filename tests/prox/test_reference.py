from __future__ import annotations

import numpy as np
import pytest
import torch
from brute import GOLDEN, brute_force, hard_groups, objective, relative_gap
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_lightning.prox.reference import prox_24_reference


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def test_objective_equals_the_certified_minimum(golden):
    y, lam, best = (torch.from_numpy(golden[key]) for key in ("y", "lam", "w_star"))
    w = prox_24_reference(y, lam[:, None])
    assert relative_gap(w, best, y, lam).max() < 1e-12


def test_weights_equal_the_certified_ones_where_they_are_unique(golden):
    y, lam, best = (torch.from_numpy(golden[key]) for key in ("y", "lam", "w_star"))
    sharp = torch.from_numpy(golden["unique"] & (golden["gap2"] > 1e-5) & (golden["wsens32"] < 1e-5))
    w = prox_24_reference(y, lam[:, None])
    error = (w - best).abs().amax(1) / y.abs().amax(1).clamp_min(1e-300)
    assert int(sharp.sum()) > 3000
    assert bool((error <= torch.from_numpy(20 * golden["wsens32"] + 2e-6))[sharp].all())


entry = st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0]), st.floats(0.9, 1.1))


@settings(max_examples=30, derandomize=True)
@given(st.lists(entry, min_size=4, max_size=4), st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.2, 3.0]))
def test_no_stationary_point_of_any_face_is_better(values, strength):
    y = torch.tensor([values], dtype=torch.float64)
    found = objective(prox_24_reference(y, strength), y, strength).item()
    assert found <= brute_force(y[0].numpy(), strength) + 1e-13


@pytest.mark.parametrize("strength", [0.2, 1.0, 1.9])
def test_a_small_change_of_the_answer_is_never_better(strength):
    y = hard_groups(600, seed=1)
    w = prox_24_reference(y, strength)
    least = objective(w, y, strength)
    for seed in range(40):
        step = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = w + step * y.abs().amax(1, keepdim=True) * 10.0 ** -(seed % 6)
        assert bool((objective(other, y, strength) >= least - 1e-13 * (y**2).sum(1)).all())
