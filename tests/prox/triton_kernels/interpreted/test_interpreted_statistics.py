"""The kernel of the statistics gives what torch operations give."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.monitoring.statistics import weight_sums
from prox24_lightning.prox.triton.statistics_pass import group_sums


@pytest.mark.parametrize("shape, dim", [((44, 100), 1), ((44, 100), 0), ((11, 4, 10, 10), 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_and_masks(groups, shape, dim, scaled):
    weight = groups.clamp(-30, 30).reshape(shape)
    scale = torch.linspace(0.3, 3, shape[-1]) if scaled else None
    sums, code = group_sums(weight, dim=dim, scale=scale)
    wanted, masks = weight_sums(weight, dim=dim, scale=scale)
    assert torch.equal(code, masks)
    assert torch.equal(sums[4:], wanted[4:])
    torch.testing.assert_close(sums, wanted)
