"""Collective operations of two processes, and of one without a process group."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist
from new_processes import spawn

from prox24_lightning.utils.distributed import any_rank, check_same, from_first, mean_over_ranks, on_first, stacked


class OddError(Exception):
    """Pickled, it cannot be made again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "masks.safetensors")


def odd():
    raise OddError("one", "two")


def each_of_two(rank):
    dist.init_process_group("gloo")
    with pytest.raises(OSError, match="No space left on device: 'masks.safetensors'"):
        on_first(full_disk)
    with pytest.raises(RuntimeError, match="OddError: one and two"):
        on_first(odd)
    mine = torch.tensor([2.0, 4.0]) * (rank + 1)
    assert stacked(mine).tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert from_first(rank) == 0
    assert on_first(lambda: f"rank {rank}") == "rank 0"
    assert any_rank(rank == 1, "cpu")
    assert not any_rank(False, "cpu")
    found = mean_over_ranks(mine)
    assert found.tolist() == [3.0, 6.0], "the mean, not the sum"
    assert found is mine
    check_same({"w": found}, "the weights", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"the weights of 'w' differ: ranks \[1\] do not have"):
        check_same({"v": found, "w": found + rank}, "the weights", torch.device("cpu"))
    dist.destroy_process_group()


def test_two_ranks():
    spawn(each_of_two)


def test_one_rank():
    with pytest.raises(OddError, match="one and two"):
        on_first(odd)
    values = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert stacked(values).tolist() == [[1.0, 2.0]]
    check_same({"w": values}, "the weights", torch.device("cpu"))
