"""Masks go to a file and come back onto another model with the same weights, which then trains on and stays 2:4."""

from __future__ import annotations

import pytest
import torch
from experts import MixtureModel
from torch import nn

from prox24_lightning import is_24, load_masks, save_masks
from prox24_lightning.mask import mask_24, read_masks
from prox24_lightning.weights.selection import select_weights


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def saved(tmp_path):
    """A pruned model, its weights' names, and the file of its masks."""
    model = small_model()
    weights = select_weights(model).chosen
    masks = {weight.name: mask_24(weight.parameter) for weight in weights}
    with torch.no_grad():
        for weight in weights:
            weight.parameter.mul_(masks[weight.name])
    return model, save_masks(tmp_path / "deep" / "masks.safetensors", weights, masks, {"step": 7})


def train(model, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()


def test_a_copy_elsewhere_is_trained_on_and_stays_24(saved):
    model, path = saved
    copy = small_model()
    copy.load_state_dict(model.state_dict())
    masked = load_masks(copy, path, expect="same")
    assert set(masked.masks) == {"0.weight", "2.weight"}
    before = copy[0].weight.detach().clone()
    train(copy, torch.optim.AdamW(copy.parameters(), lr=0.1))
    mask = masked.masks["0.weight"]
    assert (copy[0].weight[~mask] == 0).all()
    assert (copy[0].weight[mask] != before[mask]).all()
    assert read_masks(path).info == {"step": 7}


@pytest.mark.parametrize("alone", [True, False])
def test_an_optimizer_with_a_past_is_cleaned_and_followed(saved, alone):
    _, path = saved
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    masked = load_masks(model, path, optimizers=optimizer if alone else [optimizer], expect="any")
    mask = masked.masks["0.weight"]
    assert (optimizer.state[model[0].weight]["exp_avg"][~mask] == 0).all()
    model[0].weight.data[~mask] = 1.0  # something writes what it should not
    train(model, optimizer, 1)
    assert is_24(model[0].weight)
    masked.release_all()
    train(model, optimizer)
    assert not is_24(model[0].weight)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_optimizer_that_was_not_given_and_has_momentum_is_named_once(saved, recwarn, momentum):
    model, path = saved
    dense = small_model()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.01, momentum=momentum)
    train(dense, optimizer)
    dense.load_state_dict(model.state_dict())
    load_masks(dense, path)
    train(dense, optimizer)
    assert is_24(dense[0].weight) == (not momentum)
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == bool(momentum)
    assert all("non-zero weights again" in text and "optimizers=" in text for text in found)


def test_weights_without_values_are_refused(saved):
    _, path = saved
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device.*load the weights before"):
        load_masks(model, path)


@pytest.mark.parametrize("around", [lambda model: model, torch.compile])
def test_a_model_inside_of_another_is_named(saved, around):
    model, path = saved
    outer = around(nn.ModuleDict({"module": model}))
    with pytest.raises(
        ValueError, match=r"its submodule 'module' does: load them onto model.get_submodule\('module'\)"
    ):
        load_masks(outer, path)
    assert set(load_masks(outer.get_submodule("module"), path).masks) == {"0.weight", "2.weight"}


def test_a_prefix_of_the_files_names(saved, tmp_path):
    model, _ = saved
    outer = nn.ModuleDict({"model": model})
    weights = select_weights(outer).chosen
    path = save_masks(tmp_path / "m", weights, {weight.name: weight.parameter != 0 for weight in weights})
    assert set(load_masks(model, path, prefix="model.").masks) == {"0.weight", "2.weight"}
    with pytest.raises(ValueError, match=r"mask for 'model.0.weight'.*prefix='model.' would fit"):
        load_masks(model, path)
    with pytest.raises(ValueError, match=r"not have after prefix='net.'; prefix='model.' would fit"):
        load_masks(model, path, prefix="net.")


def test_a_prefix_that_the_file_does_not_have(saved):
    model, path = saved
    with pytest.raises(ValueError, match=r"'0.weight', .* after prefix='model.'; leave prefix='model.' out"):
        load_masks(model, path, prefix="model.")


@pytest.mark.parametrize(
    "expect, change, words",
    [
        ("pruned", lambda model: None, r"0.weight has \d+ non-zero weights where its mask .* prunes"),
        ("same", lambda model: None, "0.weight is not the weight that .* was saved with"),
        ("any", lambda model: model.pop(2), "a mask for '2.weight', which the model does not have; load them onto"),
        (
            "any",
            lambda model: model.__setitem__(2, nn.Linear(12, 4)),
            r"has shape \(4, 16\), the model's weight \(4, 12\)",
        ),
        ("all", lambda model: None, "expect='all' is unknown; use one of pruned, same, any"),
    ],
)
def test_masks_of_another_model_are_refused_before_anything_is_changed(saved, expect, change, words):
    model = small_model()
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_masks(model, saved[1], expect=expect)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_weights_without_a_mask_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"0.weight has no mask yet"):
        save_masks(tmp_path / "m", select_weights(small_model()).chosen, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_of_experts_come_back_and_hold(tmp_path, transposed):
    model = MixtureModel(1, transposed)
    weights = select_weights(model).chosen
    masks = {weight.name: mask_24(weight.parameter, dim=weight.dim) for weight in weights}
    path = save_masks(tmp_path / "masks.safetensors", weights, masks, {})
    copy = MixtureModel(1, transposed)
    masked = load_masks(copy, path, expect="any")
    optimizer = torch.optim.AdamW(copy.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        copy(torch.randn(4, 8, 8)).square().sum().backward()
        optimizer.step()
    for weight in select_weights(copy):
        assert torch.equal(masked.masks[weight.name], masks[weight.name])
        assert is_24(weight.parameter, dim=weight.dim)
