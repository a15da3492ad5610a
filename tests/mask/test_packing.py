from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prox24_lightning.mask import pack_mask, packing, unpack_mask


@given(st.lists(st.integers(0, 7), min_size=0, max_size=3), st.integers(0, 2**31))
def test_masks_survive_packing(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_bits_are_stored_lowest_first():
    assert pack_mask(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]


def test_a_packed_mask_is_a_32nd_of_a_float32_weight():
    weight = torch.zeros(64, 64)
    assert pack_mask(weight.bool()).nbytes * 32 == weight.nbytes


@pytest.mark.parametrize(
    "packed, shape, words",
    [
        (torch.zeros(2, dtype=torch.uint8), (4, 8), "do not belong to a mask of shape"),
        (torch.tensor([255], dtype=torch.uint8), (4,), "bits set past its end"),
    ],
)
def test_damaged_masks_are_refused(packed, shape, words):
    with pytest.raises(ValueError, match=words):
        unpack_mask(packed, shape)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="takes a bool mask"):
        pack_mask(torch.ones(4))
    with pytest.raises(TypeError, match="takes packed uint8"):
        unpack_mask(torch.ones(1), (4,))


@pytest.mark.parametrize("size", [1, 8, 23, 24, 25, 48, 50])
def test_part_by_part_the_same_bytes(size, monkeypatch):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    whole = pack_mask(mask)
    monkeypatch.setattr(packing, "BYTES_AT_A_TIME", 3)
    assert torch.equal(pack_mask(mask), whole)
    assert torch.equal(unpack_mask(whole, (size,)), mask)
