"""The checksum over training batches."""

from __future__ import annotations

import torch

from prox24_lightning.commands.training_record import TrainingRecord


def checksum(*batches, every_n_batches: int = 1) -> int:
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


def test_only_every_nth_batch_is_read():
    a, b = torch.zeros(2), torch.ones(2)
    assert checksum(a, a, b, every_n_batches=2) == checksum(a, b, b, every_n_batches=2)
    assert checksum(a, a, a, every_n_batches=2) != checksum(a, a, b, every_n_batches=2)
