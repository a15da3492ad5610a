"""The checksum over training batches."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch

from prox24_lightning.cli.compare.training_record import TrainingRecord


def checksum(*batches, every_n_batches: int = 1) -> str:
    record = TrainingRecord(every_n_batches)
    for index, batch in enumerate(batches):
        record.on_train_batch_start(None, None, batch, index)
    return record.checksum


def test_checksum_sees_values_and_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert checksum(a, b) == checksum(a.clone(), b.clone())
    assert len({checksum(a, b), checksum(b, a), checksum(a, a)}) == 3


def test_checksum_looks_into_nested_batches_of_any_dtype():
    def batch(value: int) -> dict:
        return {"x": [torch.zeros(2, dtype=torch.bfloat16)], "y": (torch.tensor(value), "text")}

    assert checksum(batch(0)) != checksum(batch(1))


@dataclass
class Pair:
    x: torch.Tensor
    label: str = ""


@pytest.mark.parametrize("make", [lambda x: UserDict(x=x), Pair, lambda x: [Pair(x), UserDict(pair=(x, Pair(x)))]])
def test_checksum_looks_into_mappings_that_are_no_dict_and_into_dataclasses(make):
    assert checksum(make(torch.zeros(2))) == checksum(make(torch.zeros(2)))
    assert checksum(make(torch.zeros(2))) != checksum(make(torch.ones(2)))


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda value: torch.tensor([[0.0, value]]).to_sparse(),
        lambda value: torch.tensor([[0.0, value]]).to_sparse_csr(),
        lambda value: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), value)]),
        lambda value: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), value)], layout=torch.jagged),
        lambda value: torch.tensor([1j * value]).conj(),
    ],
)
def test_checksum_takes_sparse_nested_and_conjugate_tensors(make):
    assert checksum(make(1.0)) == checksum(make(1.0))
    assert checksum(make(1.0)) != checksum(make(2.0))


def test_only_every_nth_batch_is_read():
    a, b = torch.zeros(2), torch.ones(2)
    assert checksum(a, a, b, every_n_batches=2) == checksum(a, b, b, every_n_batches=2)
    assert checksum(a, a, a, every_n_batches=2) != checksum(a, a, b, every_n_batches=2)
