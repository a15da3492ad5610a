"""Orders of inputs inside of the blocks of one hooked module."""

from __future__ import annotations

import torch
from torch import nn

from prox24_lightning.calibration.calls.inner_calls import inner_calls
from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.sparsify.strategies.progressive.blocks import Block
from prox24_lightning.sparsify.strategies.progressive.input_orders import choose_orders
from prox24_lightning.weights.selection import select_weights


class Net(nn.Module):
    """Blocks in a chain; ``between`` is computed between two of them."""

    def __init__(self, between=lambda number, x: x):
        super().__init__()
        torch.manual_seed(0)
        self.begin = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(6))
        self.between = between

    def forward(self, x):
        x = self.begin(x)
        for number, block in enumerate(self.blocks):
            x = block(self.between(number, x))
        return x


def recorded(net):
    generator = torch.Generator().manual_seed(0)
    return [ModuleCall.record(net, (torch.randn(32, 8, generator=generator),), {}) for _ in range(2)]


@torch.no_grad()
def test_one_rerun_of_each_batch_serves_all_blocks():
    net, reruns = Net(), []
    hooked = HookedModule(net, 2)
    blocks = [
        Block(f"blocks.{number}", block, tuple(select_weights(block)), hooked)
        for number, block in enumerate(net.blocks)
    ]
    net.begin.register_forward_hook(lambda *_: reruns.append(1))
    chosen = choose_orders(net, hooked, blocks, recorded(net))
    assert [one.free.consumers for one in chosen] == [(block[2],) for block in net.blocks]
    assert len(reruns) == 2


@torch.no_grad()
def test_a_block_that_does_not_take_what_the_one_before_returns_is_no_part_of_the_chain():
    net = Net(lambda number, x: x * 2 if number == 3 else x)
    found = inner_calls(net, list(net.blocks), recorded(net))
    assert [number for number, block in enumerate(net.blocks) if block in found] == [0, 1, 2, 4, 5]
    assert not found[net.blocks[0]].chained
    assert all(found[net.blocks[number]].chained for number in (1, 2, 4, 5))
