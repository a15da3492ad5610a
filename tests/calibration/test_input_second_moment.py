from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from prox24_lightning.calibration.statistics.input_second_moment import SCALE_FLOOR, InputSecondMoments
from prox24_lightning.weights.selection import select_weights


def watch(model, *inputs, targets=None, **arguments):
    moments = InputSecondMoments(select_weights(model, targets=targets).chosen, **arguments)
    moments.attach()
    moments.collecting = True
    for batch in inputs:
        model(batch)
        moments.fold()
    return moments


def relative_rms(x):
    mean = x.double().square().mean(0)
    return (mean / mean.mean()).sqrt().float()


def test_the_scale_is_the_relative_rms_of_every_input():
    x = torch.randn(50, 3, 8) * torch.arange(1.0, 9.0)
    model = nn.Sequential(nn.Linear(8, 4))
    scale = watch(model, x).scale("0.weight")
    assert torch.allclose(scale, relative_rms(x.flatten(0, 1)).unsqueeze(0), rtol=1e-5)


def test_batches_are_mixed_with_the_decay():
    a, b = torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)
    a[:, 0], b[:, 0] = 0.5, 0.5
    moments = watch(nn.Sequential(nn.Linear(4, 4)), a, b, decay=0.75)
    mean = torch.tensor([0.25, 3.0, 3.0, 3.0])  # 0.75 * 1 + 0.25 * 9
    assert torch.allclose(moments.scale("0.weight"), (mean / mean.mean()).sqrt().unsqueeze(0))


def test_a_scale_that_was_asked_for_before_is_not_kept_when_moments_are_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    moments = watch(model, decay=0.5)
    found = []
    for x in (torch.randn(16, 8), torch.randn(16, 8) * torch.arange(1.0, 9.0)):
        model(x)
        moments.fold()
        found.append(moments.scale("0.weight"))
        assert moments.scale("0.weight") is found[-1]  # the same tensor until moments change
    assert not torch.allclose(found[0], found[1], rtol=0.1)


def test_a_transposed_layer_gets_a_column():
    x = torch.randn(20, 8)
    model = nn.Sequential(Conv1D(4, 8))
    assert torch.allclose(watch(model, x).scale("0.weight"), relative_rms(x).unsqueeze(1), rtol=1e-5)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv1d(8, 4, 3), torch.randn(5, 8, 7)),
        (nn.Conv2d(8, 4, 3), torch.randn(5, 8, 7, 6)),
        (nn.Conv3d(8, 4, 3), torch.randn(5, 8, 4, 5, 6)),
        (nn.Conv2d(8, 4, 3), torch.randn(8, 7, 6)),
    ],
)
def test_convolutions_are_measured_by_channel(layer, x):
    channels = x.movedim(-1 - len(layer.kernel_size), -1).reshape(-1, 8)
    scale = watch(nn.Sequential(layer), x).scale("0.weight")
    assert scale.shape == (1, 8, *[1] * len(layer.kernel_size))
    assert torch.allclose(scale.flatten(), relative_rms(channels), rtol=1e-4)


def test_each_group_of_a_grouped_convolution_gets_its_own_channels():
    x = torch.randn(6, 8, 5, 5) * torch.arange(1.0, 9.0).view(8, 1, 1)
    layer = nn.Conv2d(8, 6, 3, groups=2)
    scale = watch(nn.Sequential(layer), x).scale("0.weight")
    expected = relative_rms(x.movedim(1, -1).reshape(-1, 8))
    assert scale.shape == (6, 4, 1, 1)
    assert torch.allclose(scale[0].flatten(), expected[:4], rtol=1e-4)
    assert torch.allclose(scale[5].flatten(), expected[4:], rtol=1e-4)
    assert (layer.weight * scale).shape == layer.weight.shape


def test_an_input_that_never_fires_has_a_small_positive_scale():
    x = torch.ones(4, 8)
    x[:, 3] = 0
    scale = watch(nn.Sequential(nn.Linear(8, 4)), x).scale("0.weight")
    assert scale[0, 3] == pytest.approx(SCALE_FLOOR)


def test_inputs_that_are_all_zero_give_a_finite_scale():
    scale = watch(nn.Sequential(nn.Linear(8, 4)), torch.zeros(4, 8)).scale("0.weight")
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(50, 8) * torch.arange(1.0, 9.0)
    lost = x.clone()
    lost[3, 5] = bad
    for batches in ([lost, x], [x, lost]):
        assert torch.allclose(watch(model, *batches).scale("0.weight"), watch(model, x).scale("0.weight"), rtol=1e-5)
    moments = watch(model)
    for batch in (x, lost, x):  # of one step
        model(batch)
    moments.fold()
    assert torch.allclose(moments.scale("0.weight"), watch(model, x).scale("0.weight"), rtol=1e-5)
    assert (watch(model, lost).scale("0.weight") > 0).all()


def test_validation_and_switched_off_collection_are_not_counted():
    model = nn.Sequential(nn.Linear(8, 4))
    moments = watch(model)
    with torch.no_grad():
        model(torch.ones(2, 8))
    moments.collecting = False
    model(torch.ones(2, 8))
    moments.fold()
    assert moments.scale("0.weight") is None
    assert moments.missing() == ["0.weight"]


def test_self_attention_is_measured_and_cross_attention_is_not():
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, self.other(x))[0]

    model, x = Attend(), torch.randn(3, 5, 8)
    model.other = lambda x: x
    assert watch(model, x).scale("attention.in_proj_weight").shape == (1, 8)
    model.other = torch.clone
    assert watch(model, x).scale("attention.in_proj_weight") is None


def test_state_survives():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(20, 8)
    moments = watch(model, x)
    other = InputSecondMoments(select_weights(model).chosen)
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.scale("0.weight"), moments.scale("0.weight"))


def test_detach_removes_the_hooks():
    model = nn.Sequential(nn.Linear(8, 4))
    moments = watch(model)
    moments.detach()
    model(torch.ones(2, 8))
    moments.fold()
    assert moments.missing() == ["0.weight"]


class FromAndToTheHost(TorchDispatchMode):
    """Notes operations that on a GPU wait for the device: numbers that are copied there, or read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.partition(".")[0] in ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_host_copies_and_reads_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    with FromAndToTheHost() as operations:
        x.new_tensor(1.0)
        x.sum().item()
    assert len(operations.found) == 2, "both are seen"
    with FromAndToTheHost() as operations:
        moments = watch(model, x, x)
        assert moments.scale("0.weight") is not None
    assert operations.found == []
