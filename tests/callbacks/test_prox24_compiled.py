"""Models that were compiled before the callback sees them, also as whole graphs that bear no hook of ours."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24, is_24
from prox24_lightning.calibration.calls.eager_code import EagerCode


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def module_of(net):
    torch.manual_seed(0)
    module = TinyModule()
    module.model = net
    return module


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("arguments", [{}, {"calibration": "stream"}, {"strategy": "post_step"}], ids=str)
@pytest.mark.parametrize("how", ["wrapped", "in place", "whole step"])
def test_whole_graphs_go_24_as_plain_models_do(how, arguments):
    runs = []

    def backend(graph, inputs):
        def run(*values):
            runs.append(1)
            return graph.forward(*values)

        return run

    def fit(module, net):
        prox = Prox24(3, 9, verbose=False, **arguments)
        quiet_trainer(max_steps=12, max_epochs=-1, callbacks=[prox]).fit(module, tiny_loader(4))
        assert prox.phase == "frozen"
        assert all(is_24(weight.parameter) for weight in prox.weights)
        return list(net.parameters())

    torch.manual_seed(1)
    plain = Net()
    net = Net()
    net.load_state_dict(plain.state_dict())
    expected = fit(module_of(plain), plain)
    if how == "in place":
        net.compile(backend=backend, fullgraph=True)
    module = module_of(torch.compile(net, backend=backend, fullgraph=True) if how == "wrapped" else net)
    found = fit(torch.compile(module, backend=backend, fullgraph=True) if how == "whole step" else module, net)
    torch.testing.assert_close(found, expected)
    before = len(runs)
    assert before
    module.train()
    module.training_step(next(iter(tiny_loader(4))), 0) if how == "whole step" else module.model(torch.randn(4, 8))
    assert len(runs) > before, "compiled code runs compiled again"


@pytest.mark.parametrize("first", [0, 1])
def test_code_runs_eagerly_while_anybody_asks(first):
    runs = []

    @torch.compile(backend=lambda graph, inputs: lambda *values: runs.append(1) or graph.forward(*values))
    def double(x):
        return 2 * x

    askers = [EagerCode(), EagerCode()]
    for asker in askers:
        asker.begin()
        asker.begin()
    askers[first].end()
    double(torch.ones(3))
    assert not runs
    askers[1 - first].end()
    askers[1 - first].end()
    double(torch.ones(3))
    assert runs
