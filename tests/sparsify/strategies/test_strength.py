from __future__ import annotations

import pytest
import torch

from prox24_lightning.mask import mask_24, zeros_per_group
from prox24_lightning.prox import prox_24
from prox24_lightning.sparsify import strength_for_fraction


def share(weight, dim):
    return (zeros_per_group(weight, dim=dim) >= 2).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, dim", [((64, 128), 1), ((128, 64), 0), ((16, 32, 3, 3), 1)])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99, 1.0])
def test_the_wanted_share_of_groups_leaves_the_prox_24(dtype, shape, dim, fraction):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    scale = torch.rand(shape[1] if dim else 1, generator=torch.Generator().manual_seed(1)) + 0.5
    scale = scale.view(1, -1, *[1] * (len(shape) - 2)) if dim else None
    _, strengths = strength_for_fraction(weight, fraction, dim=dim, scale=scale)
    result = prox_24(weight, strengths, dim=dim, scale=scale)
    groups = weight.numel() // 4
    tolerance = 0.02 if dtype == torch.bfloat16 else 3 / groups  # bfloat16 has many equal groups
    assert share(result, dim) == pytest.approx(fraction, abs=tolerance)
    # Survivors of a 2:4 group and every other group are the very same numbers as before.
    kept = mask_24(weight, dim=dim, scale=scale) | (strengths == 0).repeat_interleave(4, dim=dim)
    assert torch.equal(result, weight * kept)


def test_large_weights_are_sampled_within_the_stated_error(monkeypatch):
    import prox24_lightning.sparsify.strategies.post_step.strength as module

    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "SAMPLED_GROUPS", 4096)
    _, strengths = strength_for_fraction(weight, 0.5)
    assert share(prox_24(weight, strengths), 1) == pytest.approx(0.5, abs=4 / (2 * 4096**0.5))


def test_groups_that_are_24_already_count():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:16] *= mask_24(weight[:16])
    strength, strengths = strength_for_fraction(weight, 0.5)
    assert strength == 0
    assert (strengths == 0).all()
    assert torch.equal(prox_24(weight, strengths), weight)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fractions_outside_of_the_unit_interval_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction must lie in"):
        strength_for_fraction(torch.randn(4, 4), fraction)


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
@pytest.mark.parametrize("stride", [16, 64])
def test_strengths_that_depend_on_the_column_or_the_row_are_sampled_evenly(monkeypatch, dim, stride):
    """A sample of every 16th group would meet only the columns, or the rows, in which entries are a hundred times as
    large: it would find them all 2:4 at a hundredth of the strength."""
    import prox24_lightning.sparsify.strategies.post_step.strength as module

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    number = torch.arange(1024) // 4
    weight *= torch.where(number % stride == 0, 100.0, 1.0).view(*((-1, 1) if dim == 0 else (1, -1)))
    groups = weight.numel() // (4 if isinstance(dim, int) else 16)
    monkeypatch.setattr(module, "SAMPLED_GROUPS", groups // stride)
    _, strengths = strength_for_fraction(weight, 0.5, dim=dim)
    assert (strengths > 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
