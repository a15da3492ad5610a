"""Layers that store another tensor than the weight they use stay dense, with the reason and what to do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from prox24_lightning.weights.selection import select_weights
from prox24_lightning.weights.used_weight import why_recomputed, why_unknown


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / (spread + 1e-5).sqrt(), self.bias, self.stride, self.padding)


class StandardisedPart(nn.Conv1d):
    """Overrides the inner method alone."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class CentredLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight - self.weight.mean(1, keepdim=True)).T


class NormedLinear(nn.Linear):
    """Changes its inputs, not its weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(self.norm(x)) + torch.rand(8)


class ScaledLinear(nn.Linear):
    """Zeros stay zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.1, self.bias)


class WithTuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _batch, _tokens, _width = x.shape
        return super().forward(x), self.bias


class Styled(nn.Linear):
    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return F.linear(x, self.weight * style, self.bias)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def reason_of(layer: nn.Module) -> str:
    skipped = select_weights(nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))).skipped
    return " / ".join(weight.reason for weight in skipped)


@pytest.mark.parametrize(
    "layer, words",
    [
        (StandardisedConv(8, 8, 3), "StandardisedConv has a forward of its own, which recomputes the weight"),
        (StandardisedPart(8, 8, 3), "which recomputes the weight"),
        (CentredLinear(8, 8), "which recomputes the weight"),
        (Styled(8, 8), "did not show by what it multiplies; name the weight in targets"),
        (
            old_weight_norm(nn.Linear(8, 8)),
            r"weight_norm: the stored .* undo it with torch.nn.utils.remove_weight_norm",
        ),
        (parametrizations.weight_norm(nn.Linear(8, 8)), "undo it with torch.nn.utils.parametrize.remove_parametriz"),
        (spectral_norm(nn.Linear(8, 8)), "spectral_norm: .* undo it with torch.nn.utils.remove_spectral_norm"),
        (parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), "parametrized: the stored tensor is not the weight"),
        (parametrizations.orthogonal(nn.Linear(8, 8)), "parametrized: the stored tensor is not the weight"),
        (prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), r"torch.nn.utils.prune: .*prune.remove\(layer"),
    ],
)
def test_a_recomputed_weight_stays_dense_with_the_true_reason(layer, words):
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    assert [weight.name for weight in select_weights(model)] == ["0.weight", "2.weight"]
    assert re.search(words, reason_of(layer))


@pytest.mark.parametrize("layer", [NormedLinear(), ScaledLinear(8, 8), WithTuple(8, 8)])
def test_a_forward_that_keeps_the_zeros_does_not_matter(layer):
    assert why_recomputed(layer, "weight") is None
    assert why_unknown(layer, "weight") is None
    assert len(select_weights(nn.Sequential(layer))) == 1


def test_a_weight_of_an_unknown_forward_is_taken_when_a_target_names_it():
    model = nn.Sequential(Styled(8, 8))
    assert [weight.name for weight in select_weights(model, targets=["0"])] == ["0.weight"]
    with pytest.raises(ValueError, match="cannot be 2:4: StandardisedConv has a forward of its own"):
        select_weights(nn.Sequential(StandardisedConv(8, 8, 3)), targets=["0"])


def test_asking_changes_neither_the_layer_nor_the_random_state():
    layer = NormedLinear()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    why_recomputed(layer, "weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not calls


def test_a_weight_that_is_all_zero_is_asked_about_as_well():
    layer = StandardisedConv(8, 8, 3)
    nn.init.zeros_(layer.weight)
    assert why_recomputed(layer, "weight") is not None
