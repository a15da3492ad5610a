"""The buffers of weights of 8 bits. No GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, unpack_24
from prox24_lightning.convert.kernels import rounded_buffer as rounded
from prox24_lightning.convert.kernels.rounded_buffer import from_buffer, pack_buffer, padded_shape, to_buffer
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import VALUE_DTYPES, expand_rows, round_rows

FORMS = ["fp8_e4m3", "int8"]


def pruned(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(rows * columns)
    weight = torch.randn(rows, -(-columns // 4) * 4)
    return (weight * mask_24(weight))[:, :columns].to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 4), (64, 128), (100, 72), (65, 130), (192, 384)])
def test_a_buffer_gives_its_packed_weight_back(form, shape):
    packed = pack_24(pruned(*shape), form=form)
    buffer = to_buffer(packed)
    assert buffer.shape == (rounded.buffer_bytes(shape),)
    found = from_buffer(buffer, shape, form, torch.bfloat16)
    assert torch.equal(found.values.view(torch.int8), packed.values.view(torch.int8))
    assert torch.equal(found.indices, packed.indices)
    assert torch.equal(found.scales, packed.scales)
    assert (found.shape, found.form, found.dtype) == (shape, form, torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_packed_some_rows_at_a_time(form, monkeypatch):
    monkeypatch.setattr(rounded, "CHUNK_ENTRIES", 2**14)
    weight = pruned(300, 132)
    assert torch.equal(
        pack_buffer(weight, form, input_scale=0.5), to_buffer(replace(pack_24(weight, form=form), input_scale=0.5))
    )
    assert torch.equal(pack_buffer(weight.t().contiguous().t(), form), to_buffer(pack_24(weight, form=form)))


def test_what_is_not_24_is_refused_by_name():
    with pytest.raises(ValueError, match="layers.0 is not 2:4"):
        pack_buffer(torch.ones(64, 128, dtype=torch.bfloat16), "int8", name="layers.0")


@pytest.mark.parametrize(
    "row, group, nibble",
    [
        (0, 0, 0),
        (0, 1, 1),
        (8, 0, 2),
        (0, 8, 4),
        (0, 2, 8),
        (0, 4, 16),
        (1, 0, 32),
        (7, 0, 224),
        (16, 0, 256),
        (48, 0, 768),
        (0, 16, 1024),
        (0, 32, 2048),
        (64, 0, 4096),
        (73, 27, 4096 + 1024 + 32 + 2 + 4 + 8 + 1),
    ],
)
def test_metadata_lies_where_cusparselt_puts_it(row, group, nibble):
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    weight[row, 4 * group + 2 : 4 * group + 4] = 1
    buffer = to_buffer(pack_24(weight, form="int8"))
    tiles = buffer[128 * 128 : 128 * 160].view(torch.uint8)
    nibbles = torch.stack([tiles & 15, tiles >> 4], dim=-1).flatten()
    assert torch.nonzero(nibbles != 0b0100).flatten().tolist() == [nibble]
    assert nibbles[nibble] == 0b1110


def test_places_of_the_parts():
    places = rounded.places((100, 200))
    assert padded_shape((100, 200)) == (128, 256)
    assert (places.metadata, places.row_scales, places.input_scale) == (128 * 128, 128 * 160, 128 * 160 + 512)
    buffer = to_buffer(replace(pack_24(pruned(100, 200), form="int8"), input_scale=0.25))
    floats = buffer[places.row_scales :].view(torch.float32)
    assert floats[100:128].eq(1).all()
    assert floats[128:].tolist() == [0.25, 0, 0, 0]
    assert rounded.input_scale(buffer) == 0.25
    assert rounded.input_scale(to_buffer(pack_24(pruned(4, 8), form="int8"))) is None


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_scale_of_the_inputs_is_refused(scale):
    with pytest.raises(ValueError, match="must be positive and finite"):
        to_buffer(replace(pack_24(pruned(4, 8), form="int8"), input_scale=scale))


def test_only_rounded_weights():
    with pytest.raises(TypeError, match="holds a rounded weight, this one is torch.bfloat16"):
        to_buffer(pack_24(pruned(64, 64)))


@pytest.mark.parametrize("forge", [lambda b: b[:-1], lambda b: b.view(torch.uint8), lambda b: b.repeat(2)])
def test_a_forged_buffer_is_refused(forge):
    buffer = to_buffer(pack_24(pruned(64, 128), form="int8"))
    with pytest.raises(ValueError, match="no packed buffer of shape"):
        from_buffer(forge(buffer), (64, 128), "int8", torch.bfloat16)


def test_damaged_metadata_is_found_when_the_weight_is_read():
    buffer = to_buffer(pack_24(pruned(64, 128), form="int8"))
    buffer[rounded.places((64, 128)).metadata] = 0
    with pytest.raises(ValueError, match="must ascend"):
        unpack_24(from_buffer(buffer, (64, 128), "int8", torch.bfloat16))


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_buffer_gives_its_weight_back(form):
    weight = pruned(70, 200)
    rows = round_rows(weight, form)
    buffer = rounded.to_dense_buffer(rows, 2.0)
    assert buffer.shape == (rounded.dense_buffer_bytes((70, 200)),)
    found = rounded.from_dense_buffer(buffer, (70, 200), form)
    assert torch.equal(found.values.view(torch.int8), rows.values.view(torch.int8))
    assert torch.equal(found.scales, rows.scales)
    assert rounded.input_scale(buffer) == 2.0
    assert torch.equal(expand_rows(found.values, found.scales, torch.bfloat16), unpack_24(pack_24(weight, form=form)))


@pytest.mark.parametrize("form", FORMS)
def test_random_buffers_are_24_and_differ(form):
    shape = (128, 256)
    buffers = [rounded.random_buffer(shape, form, torch.device("cpu"), seed) for seed in (0, 1)]
    found = [from_buffer(buffer, shape, form, torch.float32) for buffer in buffers]
    dense = [unpack_24(packed).view(-1, 4) for packed in found]
    assert all(((group != 0).sum(-1) <= 2).all() for group in dense)
    assert not torch.equal(*dense)
    used = (dense[0] != 0).sum(0)
    assert (used > 0.4 * used.sum() / 4).all(), "every place is used"
    again = PackedWeight(found[0].values, found[0].indices, shape, found[0].scales, torch.float32)
    assert torch.equal(to_buffer(again), buffers[0])
    assert found[0].values.dtype == VALUE_DTYPES[form]
