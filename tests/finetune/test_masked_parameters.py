from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.finetune import MaskedParameters
from prox24_lightning.mask import mask_24

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def train(model, optimizer, steps, generator):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        yield
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_entries_stay_zero_without_the_net_under_the_step(optimizer):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for _ in train(model, optimizer, 5, generator):
        pass
    masked, mask = MaskedParameters(), mask_24(model.weight)
    masked.apply("weight", model.weight, mask)
    masked.mask_optimizer_state([optimizer])
    before = model.weight.detach().clone()
    for _ in train(model, optimizer, 20, generator):
        assert (model.weight.grad[~mask] == 0).all()
    assert (model.weight[~mask] == 0).all()
    assert (model.weight[mask] != before[mask]).all()
    for state in optimizer.state[model.weight].values():
        if torch.is_tensor(state) and state.shape == mask.shape:
            assert (state[~mask] == 0).all()


def test_stale_momentum_brings_weights_back_if_the_state_is_not_masked():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in train(model, optimizer, 5, generator):
        pass
    masked, mask = MaskedParameters(), mask_24(model.weight)
    masked.apply("weight", model.weight, mask)
    for _ in train(model, optimizer, 2, generator):
        pass
    assert (model.weight[~mask] != 0).any(), "the trap that mask_optimizer_state is there for"
    masked.mask_weights()
    assert (model.weight[~mask] == 0).all()


def test_a_gradient_that_is_already_there_is_masked_and_accumulation_too():
    model = nn.Linear(16, 8)
    model(torch.ones(1, 16)).sum().backward()
    masked, mask = MaskedParameters(), mask_24(model.weight)
    masked.apply("weight", model.weight, mask)
    assert (model.weight.grad[~mask] == 0).all()
    model(torch.ones(1, 16)).sum().backward()
    assert (model.weight.grad[~mask] == 0).all()
    assert (model.weight.grad[mask] == 2).all()


def test_release_stops_masking_and_keeps_the_mask():
    model = nn.Linear(16, 8)
    masked, mask = MaskedParameters(), mask_24(model.weight)
    masked.apply("weight", model.weight, mask)
    masked.release_all()
    model(torch.ones(1, 16)).sum().backward()
    assert (model.weight.grad != 0).all()
    assert torch.equal(masked.masks["weight"], mask)


def test_only_the_named_weights_are_masked():
    first, second = nn.Linear(16, 8), nn.Linear(16, 8)
    masked = MaskedParameters()
    for name, layer in (("first", first), ("second", second)):
        masked.apply(name, layer.weight, mask_24(layer.weight))
        with torch.no_grad():
            layer.weight.fill_(1.0)
    masked.mask_weights(["first"])
    assert (first.weight == 0).float().mean() == 0.5
    assert (second.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lost", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_or_weight_that_is_not_finite_becomes_zero_where_it_is_pruned(dtype, lost):
    layer = nn.Linear(16, 8).to(dtype)
    masked, mask = MaskedParameters(), mask_24(layer.weight)
    masked.apply("weight", layer.weight, mask)
    (layer.weight * lost).sum().backward()
    assert (layer.weight.grad[~mask] == 0).all()
    assert not layer.weight.grad[mask].isfinite().any()
    with torch.no_grad():
        layer.weight.masked_fill_(~mask, lost)
    masked.mask_weights()
    assert (layer.weight[~mask] == 0).all()
    assert layer.weight[mask].isfinite().all()


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask of 'weight' has shape \(8, 8\), the weight \(8, 16\)"):
        MaskedParameters().apply("weight", nn.Linear(16, 8).weight, torch.ones(8, 8, dtype=torch.bool))
