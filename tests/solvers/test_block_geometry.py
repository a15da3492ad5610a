"""The layer-wise pruner in the block geometry."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from correlated_layer import layer
from torch import nn

from prox24_lightning.mask import is_24
from prox24_lightning.mask.transposable import transposable_patterns
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.solvers import solve_layer
from prox24_lightning.solvers.exhaustive import best_block_masks
from prox24_lightning.solvers.loss import row_losses

BOTH = (0, 1)
METHODS = ("magnitude", "wanda", "sparsegpt", "prox", "prox_gradient")


def test_the_best_block_mask_is_what_a_plain_loop_finds():
    weight, hessian = layer(8, 4, 0.7)
    best, mask = best_block_masks(weight, hessian)
    root = torch.linalg.cholesky(hessian).mT
    for top in (0, 4):
        losses = {}
        for number, pattern in enumerate(transposable_patterns(weight.device).bool()):
            found = torch.zeros(4, 4, dtype=torch.float64)
            for row in range(4):
                values = torch.linalg.lstsq(root[:, pattern[row]], (root @ weight[top + row]).unsqueeze(1)).solution
                found[row, pattern[row]] = values[:, 0]
            losses[number] = float(row_losses(found, weight[top : top + 4], hessian).sum())
        number = min(losses, key=losses.__getitem__)
        assert torch.equal(mask[top : top + 4], transposable_patterns(weight.device)[number].bool())
        loss = row_losses(best, weight, hessian)[top : top + 4].sum()
        assert float(loss) == pytest.approx(losses[number])


def test_two_blocks_of_inputs_are_combined_in_every_way():
    weight, hessian = layer(4, 8, 0.7)
    best, _ = best_block_masks(weight, hessian)
    patterns = transposable_patterns(weight.device).bool()
    root, least = torch.linalg.cholesky(hessian).mT, float("inf")
    target = root @ weight.T
    tables = []
    for row in range(4):  # the loss of every pair of supports of a row, by least squares
        table = {}
        for left, right in product({tuple(p[row].tolist()) for p in patterns}, repeat=2):
            keep = torch.tensor(left + right)
            residual = root[:, keep] @ torch.linalg.lstsq(root[:, keep], target[:, row : row + 1]).solution
            table[left + right] = 0.5 * float((residual[:, 0] - target[:, row]).square().sum())
        tables.append(table)
    keys = [[tuple(row) for row in p.tolist()] for p in patterns]
    for left, right in product(keys, repeat=2):
        least = min(least, sum(tables[row][left[row] + right[row]] for row in range(4)))
    assert float(row_losses(best, weight, hessian).sum()) == pytest.approx(least)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_transposable_and_above_the_optimum(method):
    weight, hessian = layer(16, 12, 0.6)
    best, _ = best_block_masks(weight, hessian)
    found = solve_layer(weight, hessian, method=method, dim=BOTH, steps=40)
    assert is_24(found.weight, dim=BOTH)
    assert found.mask.sum() == weight.numel() / 2
    assert found.refined_loss <= found.loss
    assert row_losses(found.weight, weight, hessian).sum() >= row_losses(best, weight, hessian).sum() * (1 - 1e-9)


def test_prox_comes_far_closer_to_the_optimum_than_its_peers():
    weight, hessian = layer(64, 12, 0.9)
    optimum = row_losses(best_block_masks(weight, hessian)[0], weight, hessian).sum()
    gaps = {}
    for method in ("magnitude", "wanda", "sparsegpt", "prox"):
        found = solve_layer(weight, hessian, method=method, dim=BOTH)
        gaps[method] = float(row_losses(found.weight, weight, hessian).sum() / optimum) - 1
    assert gaps["prox"] < 0.5 * min(gaps[method] for method in ("magnitude", "wanda", "sparsegpt"))


def test_too_many_inputs_are_refused():
    with pytest.raises(ValueError, match="16 inputs have 65610000 block masks; at most 12 are enumerated"):
        best_block_masks(torch.zeros(4, 16), torch.eye(16))


def test_a_model_is_pruned_in_blocks_and_what_does_not_fit_stays_dense():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.odd, self.out = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(12, 8)

        def forward(self, hidden_states):
            return hidden_states + self.out(torch.tanh(self.left(hidden_states))) + self.odd(hidden_states).mean()

    model = nn.Sequential(nn.ModuleList([Block(), Block()]))
    model.forward = lambda x: model[0][1](model[0][0](x))
    report = prune_layerwise(model, [torch.randn(32, 8)], geometry="block", budget=0.0, steps=20)
    assert len(report.layers) == 4
    for block in model[0]:
        assert is_24(block.left.weight, dim=BOTH)
        assert is_24(block.out.weight, dim=BOTH)
        assert not is_24(block.odd.weight)
    assert {weight.reason for weight in report.skipped} == {"output size 6 does not divide by 4"}
