"""The portable packed form: exact both ways, its layout bit by bit, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_lightning.convert.format.packed_weight import (
    PACKED_DTYPES,
    PackedWeight,
    check_packed,
    pack_24,
    packed_bytes,
    padded_width,
    unpack_24,
)

ODD = st.sampled_from([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf")])
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(weight):
    return weight.contiguous().view(BITS[weight.itemsize])


@st.composite
def weights_24(draw):
    """Any bits at all in two places of each group, +0.0 elsewhere: NaN, inf, -0.0 and subnormals among them."""
    dtype = draw(st.sampled_from(PACKED_DTYPES))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    wild = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator)
    special = torch.tensor(draw(st.lists(ODD)) or [0.0])
    picks = torch.randint(0, len(special), (rows, columns), generator=generator)
    if dtype == torch.int8 or draw(st.booleans()):
        weight = wild.view(dtype) if rows and columns else torch.zeros(rows, columns).to(dtype)
    else:
        weight = special[picks].to(dtype)
    order = torch.rand(rows, padded_width(columns) // 4, 4, generator=generator).argsort(-1)
    keep = (order < draw(st.integers(0, 2))).flatten(1)[:, :columns]
    return torch.where(keep, bits(weight), torch.zeros((), dtype=BITS[dtype.itemsize])).view(dtype)


@given(weight=weights_24())
@settings(max_examples=300)
def test_unpacking_gives_every_bit_back_but_the_sign_of_dropped_zeros(weight):
    packed = pack_24(weight)
    back = unpack_24(packed)
    assert back.dtype == weight.dtype
    assert back.shape == weight.shape
    dropped_sign = (bits(back) == 0) & (weight.to(torch.float64) == 0)
    assert bool(((bits(back) == bits(weight)) | dropped_sign).all())
    assert packed.nbytes == packed_bytes(weight.shape, weight.itemsize)


@given(weight=weights_24())
@settings(max_examples=100)
def test_indices_ascend_and_packing_again_gives_the_same_bytes(weight):
    packed = pack_24(weight)
    places = torch.stack([packed.indices >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    assert bool((places[..., 0] < places[..., 1]).all())
    assert bool((places[..., 2] < places[..., 3]).all())
    again = pack_24(unpack_24(packed))
    assert torch.equal(again.indices, packed.indices)
    assert torch.equal(bits(again.values), bits(packed.values))


def test_the_layout_by_hand():
    weight = torch.tensor(
        [
            [0.0, 5.0, 0.0, 7.0, 1.0, 0.0, 2.0, 0.0],  # positions 1, 3 and 0, 2
            [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0],  # 0 fills up in front of 3; 0 and 1 where there is nothing
        ]
    )
    packed = pack_24(weight)
    assert packed.values.tolist() == [[5.0, 7.0, 1.0, 2.0], [0.0, 9.0, 0.0, 0.0]]
    assert packed.indices.tolist() == [[0b10_00_11_01], [0b01_00_11_00]]
    assert packed.shape == (2, 8)


@pytest.mark.parametrize("dtype", [dtype for dtype in PACKED_DTYPES if dtype != torch.int8])
def test_a_negative_zero_is_a_zero(dtype):
    """A weight times its mask is full of them."""
    packed = pack_24(torch.tensor([[-0.0, 1.0, -0.0, 2.0, -0.0, -0.0, -0.0, -0.0]]).to(dtype))
    assert packed.values.float().tolist() == [[1.0, 2.0, 0.0, 0.0]]
    assert packed.indices.tolist() == [[0b01_00_11_01]]


def test_rows_are_padded_to_whole_bytes():
    packed = pack_24(torch.tensor([[0.0, 0.0, 3.0, 4.0, 6.0]]))
    assert packed.values.tolist() == [[3.0, 4.0, 6.0, 0.0]]
    assert packed.indices.tolist() == [[0b01_00_11_10]]
    assert unpack_24(packed).tolist() == [[0.0, 0.0, 3.0, 4.0, 6.0]]


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.5625), (torch.float16, 0.5625), (torch.float32, 0.53125)]
)
def test_the_size_is_half_and_two_bits(dtype, share):
    weight = torch.zeros(32, 64, dtype=dtype)
    assert pack_24(weight).nbytes / weight.nbytes == share


def test_strides_and_many_rows_make_no_difference():
    weight = torch.arange(1.0, 1 + 3000 * 1024).view(1024, 3000).t()  # not contiguous, more than one chunk
    weight = weight * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(256)
    packed = pack_24(weight)
    assert torch.equal(unpack_24(packed), weight)
    assert torch.equal(packed.values, pack_24(weight.contiguous()).values)


def test_a_weight_that_is_not_24_is_refused_with_its_name_and_first_violations():
    weight = torch.zeros(4, 16)
    weight[2, 8:11] = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"layers\.0\.up is not 2:4: 1 of 16 groups .* \(at \(2, 8\): 1, 2, 3, 0\)"):
        pack_24(weight, name="layers.0.up")
    with pytest.raises(ValueError, match=r"at \(0, 4\): 1, 1, 1, 0"):
        pack_24(torch.tensor([[0.0] * 4 + [1.0] * 3]))
    with pytest.raises(ValueError, match="1 of 1 groups"):
        pack_24(torch.ones(1, 4).to(torch.float8_e5m2))


def test_what_is_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"conv has shape \(2, 4, 3, 3\): only a matrix"):
        pack_24(torch.zeros(2, 4, 3, 3), name="conv")
    with pytest.raises(TypeError, match=r"torch\.int64 cannot be packed"):
        pack_24(torch.zeros(2, 4, dtype=torch.int64))


@pytest.fixture
def packed():
    return pack_24(torch.tensor([[1.0, 0.0, 0.0, 2.0, 3.0, 4.0]]), name="up")


@pytest.mark.parametrize("indices", [0b01_00_00_11, 0b01_00_10_10, 0b00_01_11_00])
def test_indices_that_do_not_ascend_are_refused(packed, indices):
    damaged = replace(packed, indices=torch.tensor([[indices]], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"up: the two indices of group [01] in row 0 .* must ascend"):
        unpack_24(damaged, name="up")


def test_a_value_beyond_the_end_is_refused(packed):
    damaged = replace(packed, indices=packed.indices & 0b1111 | 0b10_00 << 4)
    with pytest.raises(ValueError, match="up: a value lies beyond the last of 6 inputs"):
        check_packed(damaged, name="up")


def test_tensors_that_do_not_belong_together_are_refused(packed):
    with pytest.raises(ValueError, match=r"up: values \(1, 4\) .* do not belong to a weight of shape \(2, 6\)"):
        unpack_24(replace(packed, shape=(2, 6)), name="up")
    with pytest.raises(TypeError, match=r"up: values of torch\.float32 and indices of torch\.int64"):
        unpack_24(replace(packed, indices=packed.indices.long()), name="up")


def test_rows_without_entries_cost_nothing():
    shape = (2**50, 0)
    nothing = PackedWeight(torch.empty(shape), torch.empty(shape, dtype=torch.uint8), shape)
    assert unpack_24(nothing).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_the_gpu_packs_as_the_cpu_does(dtype):
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(0, 256, (333, 100 * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)
    order = torch.rand(333, 25, 4, generator=generator).argsort(-1).flatten(1)
    weight = torch.where(order < 2, bits(wild), torch.zeros((), dtype=BITS[dtype.itemsize])).view(dtype)
    here, there = pack_24(weight), pack_24(weight.cuda())
    assert torch.equal(there.indices.cpu(), here.indices)
    assert torch.equal(bits(there.values.cpu()), bits(here.values))
    assert torch.equal(bits(unpack_24(there).cpu()), bits(unpack_24(here)))


@pytest.fixture
def rounded():
    return pack_24(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]]), form="fp8_e4m3", name="up")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_not_finite_and_positive_is_refused(rounded, scale):
    with pytest.raises(ValueError, match=r"up: the scale of row 1 is .* must be finite and positive"):
        unpack_24(replace(rounded, scales=torch.tensor([1.0, scale])), name="up")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scales": torch.ones(3)}, r"scales torch\.float32 \(3,\) do not belong to 2 rows of fp8_e4m3"),
        ({"scales": torch.ones(2, 1)}, r"scales torch\.float32 \(2, 1\) do not belong"),
        ({"scales": torch.ones(2).half()}, r"scales torch\.float16 \(2,\) do not belong"),
        ({"scales": None}, "scales and the dtype of the dense weight come together"),
        ({"dense_dtype": None}, "scales and the dtype of the dense weight come together, and that is None"),
        ({"dense_dtype": torch.int8}, r"come together, and that is torch\.int8"),
        ({"values": torch.full((2, 4), float("nan")).to(torch.float8_e4m3fn)}, "up: a value in rows 0 to 2 is NaN"),
    ],
)
def test_forged_scales_are_refused(rounded, change, words):
    with pytest.raises(ValueError, match=words):
        check_packed(replace(rounded, **change), name="up")


def test_scales_beside_values_of_16_bits_are_refused(rounded):
    with pytest.raises(TypeError, match=r"torch\.bfloat16 is not the dtype of a rounded form"):
        check_packed(replace(rounded, values=rounded.values.bfloat16(), scales=torch.ones(3)))
