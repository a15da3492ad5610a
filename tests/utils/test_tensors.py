"""What is looked through for tensors."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prox24_lightning.utils.tensors import first_tensor, map_tensors, tensors_in

Pair = namedtuple("Pair", ["x", "more"])


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    more: dict


class OwnDict(dict):
    pass


class OwnList(list):
    pass


X = torch.ones(2)
HOLDERS = {
    "tensor": X,
    "tuple": (X, 1),
    "list": [X, "text"],
    "dict": {"x": X},
    "named tuple": Pair(X, 2),
    "ordered": OrderedDict(x=X),
    "default": defaultdict(list, x=[X]),
    "deque": deque([X]),
    "own dictionary": OwnDict(x=X),
    "own list": OwnList([X]),
    "user dictionary": UserDict(x=X),
    "dataclass": Frozen(X, {"size": X.shape}),
    "object": SimpleNamespace(x=X, name="n"),
    "nested": {"a": [Frozen(Pair(X, None), {})]},
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_tensors_are_found_and_replaced_in_every_kind_of_container(kind):
    value = HOLDERS[kind]
    assert [id(tensor) for tensor in tensors_in(value)] == [id(X)]
    changed = map_tensors(lambda tensor: tensor + 1, value)
    assert type(changed) is type(value)
    assert [tensor.tolist() for tensor in tensors_in(changed)] == [[2.0, 2.0]]
    assert X.tolist() == [1.0, 1.0]
    assert tensors_in(value)[0] is X, "the value itself stays as it was"


@pytest.mark.parametrize("leaf", [X.shape, np.float64(0.5), np.zeros(2), None, range(3), int, {1, 2}, torch.float32])
def test_what_holds_no_tensor_stays_the_same_object(leaf):
    assert map_tensors(torch.clone, leaf) is leaf
    assert tensors_in(leaf) == []


def test_batches_and_outputs_of_transformers():
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    for value in (transformers.BatchEncoding({"x": X}), outputs.BaseModelOutput(last_hidden_state=X)):
        changed = map_tensors(lambda tensor: tensor + 1, value)
        assert type(changed) is type(value)
        assert [tensor.tolist() for tensor in tensors_in(changed)] == [[2.0, 2.0]]


def test_an_object_that_holds_itself_is_refused():
    loop = SimpleNamespace(x=X)
    loop.me = loop
    with pytest.raises(ValueError, match="SimpleNamespace holds too many objects"):
        tensors_in(loop)


@pytest.mark.parametrize(
    ("output", "found"), [(X, X), ((X, 1), X), ([X], X), ((), None), ({"x": X}, None), ((1, X), None)]
)
def test_the_first_tensor_of_an_output(output, found):
    assert first_tensor(output) is found
