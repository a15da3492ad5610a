"""A round of trades in one launch does what plain torch does."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.solvers.input_order import search
from prox24_lightning.solvers.input_order.trade_kernel import halves_table, trade_in_one_launch


def random_pairs(groups, seed):
    return torch.randperm(groups, generator=torch.Generator().manual_seed(seed))[: groups // 2 * 2].view(1, -1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "groups"), [(7, 2), (70, 5), (33, 8)])
def test_a_round_of_trades(rows, groups, dtype):
    # Of whole numbers sums are exact, whatever their order, and ties are ties.
    by_input = torch.randint(0, 99, (groups * 4, rows), generator=torch.Generator().manual_seed(0)).to(dtype)
    found, wanted = (torch.arange(groups * 4).view(groups, 4) for _ in range(2))
    halves = halves_table(torch.tensor(search._SPLITS))
    for seed in range(4):
        pairs, changed = random_pairs(groups, seed), torch.zeros(1, dtype=torch.int32)
        moved = search._trade(by_input, wanted, pairs)
        trade_in_one_launch(by_input, found, pairs[0], halves, changed)
        assert torch.equal(found, wanted)
        assert bool(changed) == bool(moved)
    assert sorted(found.flatten().tolist()) == list(range(groups * 4))
    assert not torch.equal(found.flatten(), torch.arange(groups * 4))


def test_nothing_moves_where_no_split_is_better():
    order, changed = torch.arange(8).view(2, 4), torch.zeros(1, dtype=torch.int32)
    trade_in_one_launch(
        torch.ones(8, 3), order, torch.tensor([[1, 0]]), halves_table(torch.tensor(search._SPLITS)), changed
    )
    assert order.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not changed


def test_no_pairs():
    trade_in_one_launch(
        torch.ones(4, 3),
        torch.arange(4).view(1, 4),
        torch.empty(0, 2, dtype=torch.long),
        halves_table(torch.tensor(search._SPLITS)),
        torch.zeros(1, dtype=torch.int32),
    )
