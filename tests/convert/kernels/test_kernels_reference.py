"""What the kernels compute, in plain torch. No GPU needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.kernels import reference
from prox24_lightning.convert.kernels.gather.reference import gather
from prox24_lightning.convert.kernels.packed_buffer import padded_shape, to_buffer
from prox24_lightning.mask import mask_24


def pruned(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randn(rows, columns).to(dtype)
    return weight * mask_24(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (128, 192)])
def test_the_product_is_that_of_the_dense_weight(shape, dtype):
    weight = pruned(*shape, dtype)
    buffer = to_buffer(pack_24(weight))
    inputs, bias = torch.randn(5, shape[1]).to(dtype), torch.randn(shape[0])
    padded = F.pad(inputs, (0, padded_shape(shape)[1] - shape[1]))
    assert torch.equal(reference.expand(buffer, shape, dtype), weight)
    assert torch.equal(reference.linear(padded, buffer, bias, dtype, shape), F.linear(inputs, weight, bias.to(dtype)))
    assert torch.equal(reference.linear(inputs, buffer, None, dtype, shape), F.linear(inputs, weight))


@pytest.mark.parametrize("transposed", [False, True])
def test_gathered_values_are_those_of_packing(transposed):
    mask = mask_24(torch.randn(64, 128), dim=(0, 1)).to(torch.bfloat16)
    weight = torch.randn(64, 128) * mask
    packed = pack_24((mask.t() if transposed else mask).contiguous())
    values = torch.full(packed.values.shape, torch.nan)
    gather(weight, packed.indices, values, transposed)
    assert torch.equal(values, pack_24((weight.t() if transposed else weight).contiguous()).values)
