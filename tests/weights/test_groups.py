from __future__ import annotations

import pytest
import torch

from prox24_lightning.weights.groups import from_groups, group_shape, resolve_group_dim, to_groups


@pytest.mark.parametrize("shape, dim", [((8, 12), -1), ((8, 12), 0), ((6, 8, 3, 3), 1), ((4,), 0), ((0, 8), 1)])
def test_groups_round_trip(shape, dim):
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    groups = to_groups(weight, dim)
    assert groups.shape[-1] == 4
    assert torch.equal(from_groups(groups, dim), weight)


def test_groups_are_a_view_so_that_writes_reach_the_weight():
    weight = torch.zeros(3, 8, 2)
    to_groups(weight, 1)[1, 0, 1, 2] = 5.0
    assert weight[1, 6, 0] == 5.0


def test_a_group_is_four_neighbours_along_dim():
    weight = torch.arange(24.0).view(2, 4, 3)
    assert to_groups(weight, 1)[1, 2, 0].tolist() == [14.0, 17.0, 20.0, 23.0]


def test_group_shape_divides_one_dimension():
    assert group_shape((6, 8, 3), 1) == (6, 2, 3)
    assert group_shape((6, 8), -1) == (6, 2)


@pytest.mark.parametrize(
    "shape, dim, words", [((3, 6), 1, "size 6, which does not divide by 4"), ((3, 4), 2, "out of")]
)
def test_bad_dims_are_refused(shape, dim, words):
    with pytest.raises(ValueError, match=words):
        resolve_group_dim(shape, dim)
