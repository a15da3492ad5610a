"""Training on sparse tensor cores, on a CUDA GPU: ``pytest -m gpu tests/convert``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.kernels.packed_buffer import to_buffer
from prox24_lightning.convert.layers.transposable_linear import TransposableForward, gather_values
from prox24_lightning.convert.measurement import relative_error
from prox24_lightning.mask import mask_24

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (320, 704)])
def test_the_gathering_kernel(shape, dtype, transposed):
    weight = torch.randn(shape, device="cuda")
    weight = weight * mask_24(weight, dim=(0, 1))
    packed = pack_24((weight.t() if transposed else weight).contiguous().to(dtype))
    wanted = to_buffer(packed)
    buffer = wanted.clone()
    buffer.view(-1)[: packed.values.numel()].fill_(-1)
    gather_values(weight, packed.indices, buffer.view(dtype), transposed=transposed)
    assert torch.equal(buffer, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(2, 64), (3, 37)])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_those_of_the_dense_layer(dtype, tokens, bias):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 256, bias=bias), nn.Tanh(), nn.Linear(256, 64, bias=bias)).cuda()
    masks = {}
    for index in (0, 2):
        weight = dense[index].weight
        masks[index] = mask_24(weight, dim=(0, 1))
        weight.data.mul_(masks[index])
    sparse = copy.deepcopy(dense)
    for index, mask in masks.items():
        TransposableForward(sparse[index], mask, smallest_work=0).attach()
    x = torch.randn(*tokens, 128, device="cuda")
    for model in (dense, sparse):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            with torch.autocast("cuda", dtype=dtype):
                loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            for index, mask in masks.items():
                model[index].weight.grad.mul_(mask)
            optimizer.step()
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-2
        assert relative_error(one.grad, other.grad) < 5e-2
