"""What is kept of one run of a block of the dense reference, and when its layers are rerun instead."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.sparsify.strategies.progressive import dense_block
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.dense_block import run_dense_block
from prox24_lightning.sparsify.strategies.progressive.errors import direct
from prox24_lightning.weights.selection import select_weights

ROW = 4 * (8 + 16)
"""Bytes of one token in the inputs of both layers."""
FITS = [([2, 2, 2], True), ([1, 1, 4], True), ([1, 2, 4], False), ([3, 1, 1], False)]
"""Lengths of batches -> whether memory for six tokens is enough for their inputs."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.runs = 0

    def forward(self, x):
        x = self.down(self.up(x).relu_())
        if len(x) > 4:
            x = self.down(self.up(x))
        self.runs += 1
        return x


def dense_inputs(lengths):
    """Return the dense reference, the groups of its block, and the block as it is run on batches of these lengths."""
    torch.manual_seed(0)
    net = Net()
    dense = copy.deepcopy(net)
    counterparts = dict(zip(net.modules(), dense.modules(), strict=True))
    batches = [torch.randn(length, 8) for length in lengths]
    groups = find_input_groups([net.up, net.down], partial(net, torch.randn(2, 8)))
    block = Block("net", net, tuple(select_weights(net)))
    found = run_dense_block(block, groups, [partial(dense, x) for x in batches], counterparts, direct)
    return dense, groups, found


def read_all(groups, found, count):
    return [found.inputs(group, number) for group in groups for number in range(count)]


def test_kept_inputs_are_those_of_a_rerun_also_where_a_later_batch_calls_a_layer_twice(monkeypatch):
    both = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(dense_block, "_KEPT_ON_CPU", limit)
        dense, groups, found = dense_inputs([2, 6])
        both.append(read_all(groups, found, 2))
        assert dense.runs == 2, "kept, or rerun as far as the layer"
    assert [len(calls) for calls in both[0]] == [1, 1, 1, 1]
    assert all(torch.equal(kept, rerun) for (kept,), (rerun,) in zip(*both, strict=True))


@pytest.mark.parametrize("lengths, kept", FITS)
def test_memory_is_enough_for_batches_of_the_lengths_that_come(monkeypatch, lengths, kept):
    monkeypatch.setattr(dense_block, "_KEPT_ON_CPU", 6 * ROW)
    _, groups, found = dense_inputs(lengths)
    first, again = (read_all(groups, found, len(lengths)) for _ in range(2))
    assert all(one[0] is other[0] for one, other in zip(first, again, strict=True)) is kept


def test_what_another_rank_cannot_keep_no_rank_keeps(monkeypatch):
    """A rerun of a sharded block makes collective calls, for which all ranks are needed."""
    monkeypatch.setattr(dense_block, "gathered_objects", lambda mine: [mine, False])
    _, groups, found = dense_inputs([2, 2])
    first, again = (found.inputs(groups[1], 0)[0] for _ in range(2))
    assert first is not again
    assert torch.equal(first, again)
