"""The order in which a GPU reads packed weights."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.convert.kernels.packed_buffer import (
    buffer_bytes,
    from_buffer,
    padded_shape,
    random_buffer,
    to_buffer,
)
from prox24_lightning.mask import is_24, mask_24


def pruned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return weight * mask_24(weight)


@pytest.mark.parametrize("shape", [(64, 64), (128, 320), (7, 4), (100, 72), (65, 68)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_and_back(shape, dtype):
    weight = pruned(*shape, dtype=dtype)
    buffer = to_buffer(pack_24(weight))
    assert buffer.dtype == torch.int16
    assert buffer.nbytes == buffer_bytes(shape)
    assert torch.equal(unpack_24(from_buffer(buffer, shape, dtype)), weight)


def test_values_come_first_row_by_row():
    weight = pruned(64, 128)
    packed = pack_24(weight)
    assert torch.equal(to_buffer(packed).flatten()[: 64 * 64].view(torch.bfloat16), packed.values.flatten())


@pytest.mark.parametrize(
    "row, group, nibble",
    [
        (0, 0, 0),  # found by packing known patterns with cuSPARSELt 0.8.0 on an H200
        (8, 0, 1),
        (0, 4, 2),
        (8, 4, 3),
        (0, 1, 4),
        (8, 7, 15),
        (1, 0, 16),
        (7, 3, 124),
        (16, 0, 128),
        (48, 0, 384),
        (0, 8, 512),
        (16, 8, 640),
        (64, 0, 4096),
        (80, 0, 4096 + 128),
    ],
)
def test_metadata_lies_where_cusparselt_puts_it(row, group, nibble):
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    weight[row, 4 * group + 2 : 4 * group + 4] = 1
    tiles = to_buffer(pack_24(weight)).flatten()[128 * 128 :].view(torch.uint8)
    nibbles = torch.stack([tiles & 15, tiles >> 4], dim=-1).flatten()
    assert torch.nonzero(nibbles != 0b0100).flatten().tolist() == [nibble]
    assert nibbles[nibble] == 0b1110


def test_padding_is_zeros_with_the_indices_0_and_1():
    buffer = to_buffer(pack_24(pruned(1, 4))).flatten()
    assert padded_shape((1, 4)) == (64, 64)
    assert int((buffer[: 64 * 32] != 0).sum()) <= 2
    tiles = buffer[64 * 32 :].view(torch.uint8)
    assert int((tiles != 0x44).sum()) <= 1


def test_only_16_bit_values():
    with pytest.raises(TypeError, match="16-bit values, these are torch.float32"):
        to_buffer(pack_24(pruned(64, 64, dtype=torch.float32)))


def test_random_buffers_are_24_and_differ():
    cpu = torch.device("cpu")
    weights = [
        unpack_24(from_buffer(random_buffer((128, 192), torch.float16, cpu, seed), (128, 192), torch.float16))
        for seed in (0, 1)
    ]
    assert all(is_24(weight) for weight in weights)
    assert not torch.equal(*weights)
    used = (weights[0].view(-1, 4) != 0).sum(0)
    assert (used > 0.4 * used.sum() / 4).all(), "every place is used"
