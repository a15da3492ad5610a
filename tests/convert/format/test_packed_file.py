"""Packed files: what was written comes back bit for bit; what is damaged, cut, forged or of others is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prox24_lightning.convert.format.header import header_digest
from prox24_lightning.convert.format.packed_weight import pack_24
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.safetensors_file import DTYPE_NAMES, TensorWriter, open_tensors
from prox24_lightning.weights.rounding import VALUE_DTYPES, round_weight


def pruned(*shape, dim=-1, dtype=torch.float32):
    weight = torch.randn(*shape)
    return (weight * mask_24(weight, dim=dim)).to(dtype)


def some_tensors():
    torch.manual_seed(0)
    embedding = torch.randn(16, 8).bfloat16()
    tensors = {
        "up.weight": pruned(6, 16, dtype=torch.bfloat16),
        "up.bias": torch.randn(6),
        "conv.weight": pruned(4, 12, 3, 3, dim=1),
        "turned.weight": pruned(8, 6, dim=0),
        "embed.weight": embedding,
        "head.weight": embedding,
        "steps": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }
    return tensors, {"up.weight": 1, "conv.weight": 1, "turned.weight": 0}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_extra_state_is_refused_by_its_name(tmp_path):
    state = {"0.weight": torch.zeros(2, 2), "1._extra_state": {"scale": 2}}
    with pytest.raises(ValueError, match="1._extra_state is a dict and no tensor"):
        write_packed(tmp_path / "packed.safetensors", state, {})
    assert not list(tmp_path.iterdir())


def test_a_state_dict_comes_back_as_it_was(tmp_path):
    tensors, dims = some_tensors()
    file = PackedFile(write_packed(tmp_path / "packed.safetensors", tensors, dims, {"model": "a", "n": [1, None]}))
    found = file.state_dict()
    assert same(found, tensors)
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert found["embed.weight"] is found["head.weight"]
    assert file.info == {"model": "a", "n": [1, None]}
    assert {name: entry.dim for name, entry in file.packed.items()} == dims
    assert file.names == tuple(sorted(tensors))


def test_others_see_plain_tensors(tmp_path):
    """Any reader of safetensors gets values and indices, at offsets that suit their type."""
    tensors, dims = some_tensors()
    path = write_packed(tmp_path / "p", tensors, dims)
    plain = load_file(path)
    packed = pack_24(tensors["up.weight"])
    assert torch.equal(plain["up.weight.values"], packed.values)
    assert torch.equal(plain["up.weight.indices"], packed.indices)
    assert plain["conv.weight.values"].shape == (4 * 3 * 3, 8)
    assert "head.weight" not in plain
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, tensor in plain.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 0.5625), (torch.float32, 0.53125)])
def test_the_file_is_half_as_large(tmp_path, dtype, share):
    tensors = {f"{i}.weight": pruned(512, 512, dtype=dtype) for i in range(4)}
    path = write_packed(tmp_path / "packed", tensors, dict.fromkeys(tensors, 1))
    save_file(tensors, tmp_path / "dense")
    ratio = path.stat().st_size / (tmp_path / "dense").stat().st_size
    assert share < ratio < share + 0.002
    file = PackedFile(path)
    assert file.stored_bytes / file.dense_bytes == share


@pytest.mark.parametrize("form", ["fp8_e4m3", "int8"])
def test_rounded_weights_come_back_rounded(tmp_path, form):
    tensors, dims = some_tensors()
    forms = dict.fromkeys(["up.weight", "conv.weight", "turned.weight"], form)
    path = write_packed(tmp_path / "packed", tensors, dims, forms=forms)
    file = PackedFile(path)
    found = file.state_dict()
    assert same(found, {name: file.packed[name].rounded(w, name) if name in dims else w for name, w in tensors.items()})
    assert torch.equal(found["up.weight"], round_weight(tensors["up.weight"], form))
    assert not torch.equal(found["up.weight"], tensors["up.weight"])
    plain = load_file(path)
    assert plain["conv.weight.values"].dtype == VALUE_DTYPES[form]
    assert plain["conv.weight.scales"].shape == (4 * 3 * 3,)
    assert file.stored_bytes < PackedFile(write_packed(tmp_path / "wide", tensors, dims)).stored_bytes
    assert file.dense_bytes == sum(t.nbytes for name, t in tensors.items() if name != "head.weight")
    write_packed(tmp_path / "again", {name: found[name] for name in tensors}, dims, forms=forms)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_only_files_with_rounded_weights_are_of_the_second_version(tmp_path):
    """Older releases read version 1 only: they still read every other file, and refuse these by their version."""
    tensors, dims = some_tensors()
    plain = write_packed(tmp_path / "plain", tensors, dims)
    rounded = write_packed(tmp_path / "rounded", tensors, dims, forms={"up.weight": "int8"})
    assert [content(path)[0]["version"] for path in (plain, rounded)] == ["1", "2"]
    assert PackedFile(rounded).packed["turned.weight"].form is None
    with pytest.raises(ValueError, match="is of version '2', this release reads 1; update prox24_lightning"):
        open_tensors(rounded, what="packed file", format="prox24 packed", versions=(1,))


def test_a_fixed_scale_of_inputs_is_in_files_of_the_third_version(tmp_path):
    tensors, dims = some_tensors()
    forms = {"up.weight": "int8"}
    path = write_packed(tmp_path / "fixed", tensors, dims, forms=forms, input_scales={"up.weight": 0.125})
    assert content(path)[0]["version"] == "3"
    assert PackedFile(path).read_packed("up.weight").input_scale == 0.125
    with pytest.raises(ValueError, match="fixed scales of inputs are not in files of version 2"):
        PackedFile(forge(path, version="2"))
    for wrong in (0, 2.0**100, float("nan")):
        with pytest.raises(ValueError, match="up.weight: the scale .* of its inputs must lie above 0 and below"):
            write_packed(tmp_path / "wrong", tensors, dims, forms=forms, input_scales={"up.weight": wrong})
    whole = write_packed(tmp_path / "whole", tensors, dims, forms=forms, input_scales={"up.weight": 1})
    assert PackedFile(whole).packed["up.weight"].input_scale == 1.0
    with pytest.raises(ValueError, match="up.weight cannot be rounded to 'bf16', only to"):
        write_packed(tmp_path / "wrong", tensors, dims, forms={"up.weight": "bf16"})
    with pytest.raises(ValueError, match="turned.weight has a scale for its inputs and is not rounded"):
        write_packed(tmp_path / "wrong", tensors, dims, forms=forms, input_scales={"turned.weight": 0.125})
    packed = json.loads(content(path)[0]["packed"])
    for scale in (0.0, -1.0, 1e40, "1", True):
        packed["up.weight"]["input_scale"] = scale
        with pytest.raises(ValueError, match="up.weight has no valid scale of its inputs"):
            PackedFile(forge(path, packed=json.dumps(packed)))


def test_forms_of_weights_that_are_not_packed_or_cannot_be_rounded_are_refused(tmp_path):
    tensors, dims = some_tensors()
    with pytest.raises(ValueError, match="embed.weight is to be rounded and is not packed"):
        write_packed(tmp_path / "p", tensors, dims, forms={"embed.weight": "int8"})
    tensors["up.weight"][2, 4:8] = torch.tensor([float("inf"), 0, 0, 0])
    with pytest.raises(ValueError, match="up.weight: row 2 holds NaN, inf"):
        write_packed(tmp_path / "p", tensors, dims, forms={"up.weight": "int8"})
    with pytest.raises(TypeError, match=r"w: torch\.int8 cannot be packed"):
        write_packed(tmp_path / "p", {"w": torch.zeros(4, 4, dtype=torch.int8)}, {"w": 1}, forms={"w": "int8"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"form": "int4", "dtype": "F32"}, "w has no valid form or dtype"),
        ({"form": "int8"}, "w has no valid form or dtype"),
        ({"dtype": "F32"}, "w has no valid form or dtype"),
        ({"form": ["int8"], "dtype": "F32"}, "w has no valid form or dtype"),
        ({"form": "int8", "dtype": "I8"}, "w has no valid form or dtype"),
        ({"form": "fp8_e4m3", "dtype": "F32"}, "does not fit what is stored"),
        ({}, "does not fit what is stored|hashes"),
    ],
)
def test_forged_forms_are_refused(tmp_path, entry, words):
    path = write_packed(tmp_path / "p", {"w": pruned(4, 8), "b": torch.zeros(3)}, {"w": 1}, forms={"w": "int8"})
    changed = {"packed": {"w": {"shape": [4, 8], "dim": 1, **entry}}}
    if not entry:
        metadata, tensors = content(path)
        del tensors["w.scales"]
        save_file(tensors, path, metadata)
        changed = {}
    with pytest.raises(ValueError, match=f"forged or broken packed file: .*({words})"):
        PackedFile(forge(path, **changed))


@pytest.mark.parametrize(
    "scales, words",
    [
        ([1.0, float("nan"), 1.0, 1.0], "w: the scale of row 1 is nan, it must be finite and positive"),
        ([1.0, 1.0, 1.0, -2.0], "w: the scale of row 3 is -2.0"),
    ],
)
def test_forged_scales_are_refused(tmp_path, scales, words):
    path = write_packed(tmp_path / "p", {"w": pruned(4, 8), "b": torch.zeros(3)}, {"w": 1}, forms={"w": "int8"})
    metadata, tensors = content(path)
    tensors["w.scales"] = torch.tensor(scales)
    hashes = json.loads(metadata["hashes"])
    hashes["w.scales"] = hashlib.sha256(tensors["w.scales"].numpy().tobytes()).hexdigest()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"forged or broken packed file: {words}"):
        PackedFile(forge(path, hashes=hashes)).read("w")


def test_scales_of_another_shape_and_rounded_weights_in_the_first_version_are_refused(tmp_path):
    path = write_packed(tmp_path / "p", {"w": pruned(4, 8), "b": torch.zeros(3)}, {"w": 1}, forms={"w": "int8"})
    whole = path.read_bytes()
    metadata, tensors = content(path)
    save_file({**tensors, "w.scales": torch.ones(4, 1)}, path, metadata)
    with pytest.raises(ValueError, match=r"w of shape \(4, 8\) does not fit what is stored"):
        PackedFile(forge(path))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="rounded weights are not in files of version 1"):
        PackedFile(forge(path, version="1"))


def test_a_weight_that_is_not_24_leaves_no_file(tmp_path):
    tensors, dims = some_tensors()
    tensors["up.weight"][3, 4:7] = 1
    with pytest.raises(ValueError, match=r"up\.weight is not 2:4: 1 of 24 groups .*at \(3, 4\): 1, 1, 1"):
        write_packed(tmp_path / "packed", tensors, dims)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensors, dims, words",
    [
        ({"w": torch.zeros(4, 4)}, {"v": 1}, "there is no tensor 'v' to pack"),
        ({"w": torch.zeros(4, 4)}, {"w": 2}, r"w of shape \(4, 4\) has no groups along dimension 2"),
        ({"w": torch.zeros(4)}, {"w": 0}, r"w of shape \(4,\) has no groups along dimension 0"),
        ({"w": torch.zeros(4, 4, device="meta")}, {"w": 1}, "w: .* on meta cannot be stored"),
        ({"w": torch.zeros(4, dtype=torch.complex64)}, {}, "w: torch.complex64 .* cannot be stored"),
        ({"w.values": torch.zeros(4), "w": torch.zeros(4, 4)}, {"w": 1}, "cannot be stored as 'w.values'"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors, dims, words):
    with pytest.raises(ValueError, match=words):
        write_packed(tmp_path / "packed", tensors, dims)
    assert list(tmp_path.iterdir()) == []


def test_an_integer_weight_is_not_packed(tmp_path):
    with pytest.raises(TypeError, match=r"w: torch.int64 cannot be packed"):
        write_packed(tmp_path / "packed", {"w": torch.zeros(4, 4, dtype=torch.int64)}, {"w": 1})


def test_every_dtype_is_named_as_the_library_names_it(tmp_path):
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPE_NAMES}
    write_packed(tmp_path / "all", tensors, {})
    assert same(load_file(tmp_path / "all"), tensors)


def test_a_writer_refuses_a_tensor_that_was_not_announced(tmp_path):
    with TensorWriter(tmp_path / "t", {"a": (torch.float32, (2,))}, {}) as writer:
        with pytest.raises(ValueError, match="a: torch.float32 .3,. is not what was announced"):
            writer.write("a", torch.zeros(3))
        with pytest.raises(ValueError, match=r"missing are \['a'\]"):
            writer.finish({})
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="came twice"):
            writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="header"):
            writer.finish({"more": "words"})


def test_a_tensor_that_is_not_there(tmp_path):
    file = PackedFile(write_packed(tmp_path / "p", *some_tensors()))
    with pytest.raises(KeyError, match="holds no tensor 'nope'"):
        file.read("nope")
    with pytest.raises(FileNotFoundError, match="there is no packed file"):
        PackedFile(tmp_path / "q")


def content(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": "pt"}, r"is no packed file of prox24_lightning \(its format is 'pt'\)"),
        ({"version": "4"}, "is of version '4', this release reads 1, 2, 3; update"),
        ({"info": '{"model": "b"}'}, "is damaged: its checksum does not fit its header"),
        ({"sha256": "0"}, "is damaged: its checksum does not fit its header"),
    ],
)
def test_other_files_and_later_versions_are_refused(tmp_path, change, words):
    path = write_packed(tmp_path / "p", *some_tensors())
    metadata, tensors = content(path)
    save_file(tensors, path, metadata={**metadata, **change})
    with pytest.raises(ValueError, match=words):
        PackedFile(path)


def forge(path, **changes):
    """A file with a right header checksum that says what it likes."""
    metadata, tensors = content(path)
    said = {key: metadata[key] for key in ("version", "packed", "aliases", "hashes", "info")}
    for key, value in changes.items():
        said[key] = value if isinstance(value, str) else json.dumps(value)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "prox24 packed", **said, "sha256": header_digest(said, layout)})
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"packed": "[]"}, "its JSON is no object"),
        ({"info": "[" * 100_000}, "nested too deeply"),
        ({"packed": {"w": 3}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [4, -8], "dim": 1}}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [True, 8], "dim": 1}}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [4, 8], "dim": 2}}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [8], "dim": 0}}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [4, 8], "dim": "1"}}}, "w has no valid shape or dim"),
        ({"packed": {"w": {"shape": [2**40, 2**30], "dim": 1}}}, "does not fit what is stored"),
        ({"packed": {"w": {"shape": [1] * 100_000, "dim": 1}}}, "does not fit what is stored"),
        ({"packed": '{"w": {"shape": [%s, 8], "dim": 1}}' % ("9" * 4000)}, "does not fit what is stored"),
        ({"packed": {"w": {"shape": [8, 8], "dim": 1}}}, "does not fit what is stored"),
        ({"packed": {"b": {"shape": [4, 8], "dim": 1}}}, "does not fit what is stored"),
        ({"aliases": {"a": "none"}}, "a shares the tensor 'none'"),
        ({"aliases": {"a": ["b"]}}, "a shares the tensor"),
        ({"aliases": {"b": "w"}}, "b shares the tensor 'w'"),
        ({"aliases": {"b": "w" * 100_000}}, "b shares the tensor 'www"),
        ({"hashes": {}}, "hashes are given for"),
    ],
)
def test_forged_headers_with_a_right_checksum_are_refused(tmp_path, changes, words):
    """Someone who can compute the checksum can still not make the reader allocate, recurse or believe nonsense."""
    path = write_packed(tmp_path / "p", {"w": pruned(4, 8), "b": torch.zeros(3)}, {"w": 1})
    with pytest.raises(ValueError, match=f"forged or broken packed file: .*{words}") as error:
        PackedFile(forge(path, **changes))
    assert len(str(error.value)) < 1000


def test_forged_indices_are_refused(tmp_path):
    path = write_packed(tmp_path / "p", {"w": pruned(4, 8), "b": torch.zeros(3)}, {"w": 1})
    metadata, tensors = content(path)
    tensors["w.indices"][1] = 0
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"is damaged: the checksum of w\.indices does not fit"):
        PackedFile(path).read("w")
    hashes = json.loads(metadata["hashes"])
    hashes["w.indices"] = hashlib.sha256(tensors["w.indices"].numpy().tobytes()).hexdigest()
    with pytest.raises(ValueError, match=r"forged or broken packed file: w: the two indices of group 0 in row 1"):
        PackedFile(forge(path, hashes=hashes)).read("w")


def test_a_pickle_is_not_opened(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        PackedFile(tmp_path / "pickle.pt")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return write_packed(folder / "p", *some_tensors(), {"step": 3}).read_bytes(), folder / "damaged"


def read_or_refuse(data, path):
    path.write_bytes(data)
    try:
        file = PackedFile(path)
        return file.state_dict(), file.info
    except ValueError:
        return None


@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bits_are_refused_or_change_nothing(whole_file, data):
    whole, path = whole_file
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = read_or_refuse(bytes(damaged), path)
    assert found is None or (same(found[0], some_tensors()[0]) and found[1] == {"step": 3})


@settings(max_examples=150)
@given(data=st.data())
def test_a_file_cut_short_or_with_bytes_put_in_is_refused(whole_file, data):
    whole, path = whole_file
    at = data.draw(st.integers(0, len(whole) - 1))
    inserted = data.draw(st.binary(min_size=1, max_size=8))
    assert read_or_refuse(whole[:at], path) is None
    found = read_or_refuse(whole[:at] + inserted + whole[at:], path)
    assert found is None or same(found[0], some_tensors()[0])


@settings(max_examples=150)
@given(data=st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(whole_file, data):
    assert read_or_refuse(data, whole_file[1]) is None
