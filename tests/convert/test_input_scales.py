"""Fixed scales of a layer's inputs: measured on calibration batches, kept by the layer's buffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.convert import convert_model, measure_input_scales
from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.kernels import buffers, reference
from prox24_lightning.convert.kernels.rounded_buffer import input_scale, pack_buffer
from prox24_lightning.convert.layers.dense_fp8_linear import DenseFp8Linear
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import round_rows


def called(layers, batches, **options):
    model = nn.Sequential(*layers)
    runs = [lambda x=x: model(x) for x in batches]
    return measure_input_scales({str(n): layer for n, layer in enumerate(layers)}, runs, "int8", **options)


def test_the_scale_is_the_largest_input_or_a_quantile_of_the_tokens_largest():
    batches = [torch.tensor([[1.0, -127.0], [0.5, 2.0]]), torch.tensor([[[4.0, 3.0], [0.0, -1.0]]])]
    layers = [nn.Linear(2, 4), nn.Linear(4, 4)]
    with torch.no_grad():
        layers[1].weight.zero_()
    found = called(layers, batches)
    assert found["0"] == 1.0
    assert set(found) == {"0", "1"}
    assert called(layers, batches, quantile=0.5)["0"] == pytest.approx(2 / 127)  # of 127, 2, 4 and 1
    assert not layers[0]._forward_pre_hooks


def test_one_token_without_a_batch_and_more_tokens_than_a_quantile_of_torch_takes():
    assert called([nn.Linear(2, 4)], [torch.tensor([127.0, -254.0])])["0"] == 2.0
    many = torch.ones(1, 1).expand(2**24 + 1, 1)
    runs = [lambda: layer(many)]
    layer = nn.Identity()
    assert measure_input_scales({"0": layer}, runs, "int8", quantile=0.9)["0"] == pytest.approx(1 / 127)


def test_what_gives_no_scale():
    layer = nn.Linear(2, 2)
    for empty in (torch.zeros(1, 2), torch.zeros(0, 2), torch.full((1, 2), 1e-44)):
        assert called([layer], [empty]) == {}
    assert measure_input_scales({"unused": nn.Linear(2, 2)}, [lambda: layer(torch.ones(1, 2))], "int8") == {}
    with pytest.raises(ValueError, match="take calibration data, and there is none"):
        called([layer], [])
    with pytest.raises(ValueError, match="0 was called with inputs that are not finite"):
        called([layer], [torch.full((1, 2), float("inf"))])
    with pytest.raises(ValueError, match=r"input_quantile=1.5 must lie in \(0, 1\]"):
        called([layer], [], quantile=1.5)
    with pytest.raises(ValueError, match="input_quantile='1' must lie in"):
        called([layer], [], quantile="1")
    with pytest.raises(ValueError, match="input_scales are for rounded weights"):
        convert_model(layer, input_scales={"": 1.0})


def test_a_layer_keeps_its_scale_in_every_form():
    torch.manual_seed(0)
    weight = torch.randn(64, 128).bfloat16()
    weight *= mask_24(weight)
    buffer = pack_buffer(weight, "fp8_e4m3", input_scale=0.25)
    packed = buffers.from_buffer(buffer, (64, 128), torch.bfloat16, "fp8_e4m3")
    assert packed.input_scale == 0.25
    assert torch.equal(buffers.to_buffer(packed), buffer)
    dense = DenseFp8Linear(round_rows(weight, "fp8_e4m3"), torch.bfloat16, None, "1=dense_fp8:0", input_scale=0.25)
    assert (dense.packed_weight.input_scale, input_scale(dense.packed)) == (0.25, 0.25)
    # 200 exceeds what fp8 holds at this scale: clamped to 448 x 0.25.
    inputs = torch.zeros(1, 128, dtype=torch.bfloat16)
    inputs[0, 0] = 200.0
    free = buffers.to_buffer(pack_24(weight, form="fp8_e4m3"))
    found, exact = (
        reference.linear(inputs, one, None, torch.bfloat16, (64, 128), "fp8_e4m3").float() for one in (buffer, free)
    )
    torch.testing.assert_close(found, exact * (112 / 200), rtol=0.02, atol=0.5)
