from itertools import combinations, product

import pytest
import torch
from correlated_layer import layer

from prox24_lightning.mask import is_24
from prox24_lightning.solvers import solve_layer
from prox24_lightning.solvers.exhaustive import best_masks
from prox24_lightning.solvers.loss import row_losses


def test_it_finds_what_a_plain_loop_over_masks_finds():
    weight, hessian = layer(3, 8, 0.7)
    found, mask = best_masks(weight, hessian)
    for row in range(3):
        losses = {}
        for pairs in product(combinations(range(4), 2), repeat=2):
            support = [4 * group + entry for group, pair in enumerate(pairs) for entry in pair]
            # Least squares on the outputs themselves: a different road from normal equations.
            root = torch.linalg.cholesky(hessian).mT
            values = torch.linalg.lstsq(root[:, support], (root @ weight[row]).unsqueeze(1)).solution[:, 0]
            full = torch.zeros(8, dtype=torch.float64)
            full[support] = values
            losses[tuple(support)] = float(row_losses(full.unsqueeze(0), weight[row : row + 1], hessian))
        best = min(losses, key=losses.__getitem__)
        assert mask[row].nonzero()[:, 0].tolist() == list(best)
        assert float(row_losses(found, weight, hessian)[row]) == pytest.approx(losses[best])
    assert is_24(found)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_no_method_beats_the_true_optimum_and_prox_comes_far_closer_than_sparsegpt(correlation):
    weight, hessian = layer(48, 16, correlation)
    best, _ = best_masks(weight, hessian)
    optimum = row_losses(best, weight, hessian).sum()
    gaps = {}
    for method in ("magnitude", "wanda", "sparsegpt", "prox", "prox_gradient"):
        found = solve_layer(weight, hessian, method=method, steps=100)
        gaps[method] = float(row_losses(found.weight, weight, hessian).sum() / optimum) - 1
        assert gaps[method] > -1e-9
    assert gaps["prox"] < 0.5 * min(gaps["magnitude"], gaps["wanda"], gaps["sparsegpt"])


def test_more_than_sixteen_inputs_are_refused():
    with pytest.raises(ValueError, match="20 inputs have 7776 masks a row; at most 16 are enumerated"):
        best_masks(torch.zeros(1, 20), torch.eye(20))
