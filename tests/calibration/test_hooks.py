"""Hooks stay with their module: not with copies, pickles or reruns of it."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from prox24_lightning.calibration.calls.eager_code import inside_compiled
from prox24_lightning.calibration.calls.hooks import after_call, before_call, silent_hooks


def hooked():
    module, heard = nn.Sequential(nn.Linear(4, 4)), []
    handles = [
        before_call(module, lambda module, args, kwargs: heard.append("before")),
        after_call(module, lambda module, args, kwargs, output: heard.append("after")),
    ]
    return module, heard, handles


def test_calls_are_heard_until_the_hooks_are_removed():
    module, heard, handles = hooked()
    module(torch.ones(4))
    assert heard == ["before", "after"]
    for handle in handles:
        handle.remove()
    module(torch.ones(4))
    assert heard == ["before", "after"]
    assert not module._forward_hooks


def test_copies_and_pickles_are_not_heard():
    module, heard, _ = hooked()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(other(torch.ones(4)), module[0](torch.ones(4)))
    assert heard == []


def test_silent_hooks_hear_nothing():
    module, heard, _ = hooked()
    with silent_hooks():
        module(torch.ones(4))
    assert heard == []
    module(torch.ones(4))
    assert heard == ["before", "after"]


def test_what_lies_in_compiled_code():
    plain, wrapped, compiled = nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 4)
    compiled.compile(backend="eager")
    assert inside_compiled(nn.ModuleList([plain, wrapped, compiled])) == {wrapped._orig_mod, compiled}
