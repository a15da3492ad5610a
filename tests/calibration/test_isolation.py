"""A rerun changes nothing of the module, nor of the random state."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.isolation.module_state import ModuleState


class Busy(nn.Module):
    """Changes all that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("bank", torch.zeros(2))
        self.calls, self.log, self.table, self.last = 0, [], {}, deque(maxlen=2)

    def forward(self, x):
        self.seen += 1
        self.bank = self.bank + 1
        self.calls += 1
        self.log.append(x)
        self.table[self.calls] = x
        self.last.append(x)
        self.extra = x
        return self.dropout(self.norm(self.layer(x))) + random.random() + float(np.random.rand())


def everything(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, module.calls, list(module.log), dict(module.table), list(module.last), hasattr(module, "extra")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("options", [{}, {"as_trained": True}, {"as_trained": True, "gradients": True, "hooks": False}])
def test_nothing_changes(options, fails):
    module = Busy()
    before, states = everything(module), RandomState.now(torch.device("cpu"))
    buffers = dict(module.named_buffers())
    grad = torch.is_grad_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with isolated(module, **options):
            module(torch.randn(3, 4))
            assert module.calls == 1
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = everything(module)
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items())
    assert before[1:] == after[1:]
    assert all(buffer is buffers[name] for name, buffer in module.named_buffers()), "not even the objects"
    assert states.same_as(RandomState.now(torch.device("cpu")))
    assert all(each.training for each in module.modules())
    assert torch.is_grad_enabled() is grad
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_a_buffer_that_backward_needs_is_not_written_to():
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x):
            self.scale += 1
            return x * self.scale

    module, x = Scales(), torch.ones(4, requires_grad=True)
    y = module(x)
    with isolated(module):
        module(torch.ones(4))
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 4


def test_modes_of_training_but_for_what_is_random():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.0), nn.BatchNorm1d(4))
    with isolated(module, as_trained=True):
        assert [each.training for each in module] == [True, False, True, False]
    with isolated(module):
        assert not any(each.training for each in module.modules())


def test_hooks_of_others_can_be_left_out():
    module, heard = nn.Linear(4, 4), []
    module.register_forward_hook(lambda *_: heard.append(1))
    with isolated(module, hooks=False):
        module(torch.ones(4))
    assert heard == []
    module(torch.ones(4))
    assert heard == [1]


def test_attributes_that_were_set_are_named():
    module = Busy()
    before = ModuleState(module, values=False)
    module.calls = 1
    module.log.append(1)
    module.norm.eps = 1e-5
    assert before.changed_attributes(ModuleState(module)) == ["Busy.calls", "Busy.log"]


def test_random_states_go_into_tensors_and_back():
    random.gauss(0, 1)
    np.random.randn()
    state = RandomState.now(torch.device("cpu"))
    again = RandomState.from_state_dict(state.state_dict())

    def drawn():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    first = drawn()
    assert not state.same_as(RandomState.now(torch.device("cpu")))
    again.restore(torch.device("cpu"))
    assert drawn() == first
