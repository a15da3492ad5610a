"""Inputs are caught where Python sees the call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prox24_lightning.convert.benchmark.example_inputs import InputCatcher


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x, *, scale=1.0):
        return self.head(self.body(x)) * scale


class Wrapper(nn.Module):
    """Like a LightningModule around a model."""

    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x):
        return self.model(x, scale=2.0)


LAYERS = ["model.body.0", "model.body.2"]


def test_the_outermost_submodule_is_preferred():
    root = Wrapper()
    catcher = InputCatcher(root, LAYERS)
    x = torch.randn(3, 8)
    root(x)
    assert catcher.inputs.module_name == "model"
    assert catcher.inputs.kwargs == {"scale": 2.0}
    assert torch.equal(catcher.inputs.args[0], x)
    assert catcher.inputs.args[0] is not x
    x.zero_()
    assert catcher.inputs.args[0].abs().sum() > 0


def test_only_the_first_call_counts_and_hooks_go():
    root = Wrapper()
    catcher = InputCatcher(root, LAYERS)
    root(torch.ones(3, 8))
    root(torch.zeros(3, 8))
    assert catcher.inputs.args[0].sum() == 24
    catcher.remove()
    assert not any(module._forward_pre_hooks for module in root.modules())


def test_a_part_is_taken_where_the_whole_is_never_called():
    root = Wrapper()
    catcher = InputCatcher(root, LAYERS)
    root.model.body(torch.ones(3, 8))
    assert catcher.inputs.module_name == "model.body"


@pytest.mark.parametrize("layers, name", [(["a", "b"], ""), (["a"], ""), ([], None)])
def test_layers_at_the_top_need_the_root(layers, name):
    root = nn.Sequential()
    root.add_module("a", nn.Linear(4, 4))
    root.add_module("b", nn.Linear(4, 4))
    catcher = InputCatcher(root, layers)
    root(torch.ones(2, 4))
    assert (catcher.inputs and catcher.inputs.module_name) == name


def test_a_compiled_model_is_watched_from_outside():
    root = Wrapper()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    root.model = torch.compile(root.model, backend=backend)
    catcher = InputCatcher(root, LAYERS)
    root(torch.ones(3, 8))
    catcher.remove()
    root(torch.ones(3, 8))
    assert catcher.inputs.module_name == "model"
    assert len(compilations) == 1, "no recompilation once the hook is gone"


def test_nothing_is_hooked_in_a_model_compiled_whole():
    root = Wrapper()
    root.compile(backend="eager")
    catcher = InputCatcher(root, LAYERS)
    assert not any(module._forward_pre_hooks for module in root.modules())
    assert catcher.inputs is None


def test_an_input_that_cannot_be_kept_does_not_stop_the_run():
    class Stubborn(torch.Tensor):
        def detach(self):
            raise RuntimeError("no")

    root = Wrapper()
    catcher = InputCatcher(root, LAYERS)
    root(torch.ones(3, 8).as_subclass(Stubborn))
    assert catcher.inputs is None
