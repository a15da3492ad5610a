"""A model of three like blocks, its calibration batches, and a short one-shot pruning run."""

from __future__ import annotations

import torch
from torch import nn

from prox24_lightning.oneshot import prune_layerwise

WIDTH = 16


class Block(nn.Module):
    def __init__(self, returns="tensor"):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.out = nn.Linear(24, WIDTH)
        self.returns = returns

    def forward(self, hidden_states, shift=None, *, flag=True):
        x = self.out(torch.tanh(self.left(hidden_states)) * self.right(hidden_states))
        x = hidden_states + x + (0 if shift is None else shift)
        return x if self.returns == "tensor" else (x, None) if self.returns == "tuple" else {"x": x}


class Model(nn.Module):
    def __init__(self, returns="tensor", blocks=3):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block(returns) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)
        self.returns = returns

    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, shift=torch.tensor(0.1 * number), flag=False)
            x = x if self.returns == "tensor" else x[0]
        return self.head(x)


def seeded(**kwargs):
    torch.manual_seed(0)
    return Model(**kwargs).eval()


def batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 20, 8, generator=generator) for _ in range(count)]


def prune(model, data=None, **kwargs):
    options = {"progress": False, "steps": 10, "dense_target": 0.0} | kwargs
    return prune_layerwise(model, batches() if data is None else data, **options)


class KilledError(Exception):
    pass


def killed_in(module, after):
    """Raise at the given call of a layer's forward pass."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) > after:
            raise KilledError

    return module.register_forward_pre_hook(hook)
