"""Calls of neighbouring blocks on recorded batches."""

from __future__ import annotations

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns
from prox24_lightning.weights.selection import select_weights

BATCHES = 3


@torch.no_grad()
def test_hidden_states_of_one_block_are_kept_at_a_time():
    net, made = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))), []
    hooked = HookedModule(net, BATCHES)
    reference = hooked.keep_reference(sharded=False)
    for block in (*net, *reference):
        block.register_forward_hook(lambda _, args, output: made.append(StorageWeakRef(output.untyped_storage())))
    blocks = [Block(str(number), block, tuple(select_weights(block)), hooked) for number, block in enumerate(net)]
    calls = [ModuleCall.record(net, (torch.randn(16, 8),), {}) for _ in range(BATCHES)]
    kept = []
    with hooked.rerunning():
        # From the second block on: what it is called with is an output of the first.
        reruns = BlockReruns(net, hooked, blocks[1:], calls)
        kept.append(sum(not one.expired() for one in made))
        for block in blocks[1:]:
            runs, (dense_runs, _) = reruns.runs_of(block), reruns.dense_runs_of(block)
            reruns.pass_on(block, runs, dense_runs)
            runs = dense_runs = None
            kept.append(sum(not one.expired() for one in made))
    assert kept == [2 * BATCHES] * 5 + [0]
