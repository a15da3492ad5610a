"""An error inside the user's forward leaves the model as it was but for the blocks that are finished."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_blocks import KilledError, batches, prune, seeded
from torch import nn

from prox24_lightning.mask import is_24

CASES = {
    "recording": ("", 1, {}),
    "the first block's form": ("layers.0", 0, {}),
    "the order of layers": ("layers.1.left", 0, {}),
    "a Hessian": ("layers.1.right", 2, {}),
    "the dense copy": ("layers.1.right", 3, {"dense_target": 0.5}),
    "the next hidden states": ("layers.1.out", 2, {}),
    "the budget": ("layers.1.out", 2, {"budget": 0.2}),
}


def failing(module, after):
    """Let the module's forward raise from call ``after`` on; the attribute is the user's own, and must come back."""
    calls, forward = [], module.forward

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KilledError
        return forward(*args, **kwargs)

    module.forward = fails
    return fails


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_as_it_was_after_an_error(case, monkeypatch):
    name, after, options = CASES[case]
    model = seeded()
    model.config = SimpleNamespace(use_cache=True)
    model.train()
    model.layers[2].eval()
    model.layers[0].left.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    places = {}
    move = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, device: places.update({self: str(device)}) or move(self, "cpu"))
    fails = failing(model.get_submodule(name), after)
    forwards = [vars(module).get("forward") for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()

    with pytest.raises(KilledError):
        prune(model, device="cpu:0", **options)

    assert model.get_submodule(name).forward is fails
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert [module.training for module in model.modules()] == modes
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert model.config.use_cache is True
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert torch.is_grad_enabled()
    assert set(places.values()) <= {"cpu"}, "every block that was moved to cpu:0 is home again"
    del model.get_submodule(name).forward
    for key, value in model.state_dict().items():
        changed = not torch.equal(value, before[key])
        finished = key.startswith("layers.0.") and is_24(value) if value.dim() == 2 else False
        assert not changed or finished or key.startswith("layers.1."), key


def test_a_run_after_a_failed_one_gives_what_a_first_run_gives():
    model, fresh = seeded(), seeded()
    failing(model.layers[0].right, 0)
    with pytest.raises(KilledError):
        prune(model)
    del model.layers[0].right.forward
    prune(model)
    prune(fresh)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_block_that_cannot_be_copied_is_pruned_without_its_dense_target(caplog):
    model, plain = seeded(), seeded()
    for layer in model.layers:
        layer.lock = threading.Lock()
    report = prune(model, dense_target=0.5)
    prune(plain, dense_target=0.0)
    assert len(report.layers) == 9
    assert caplog.text.count("from here on the run goes on with dense_target=0") == 1
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_generator_of_batches_that_fails_ends_the_run_with_its_error():
    def data():
        yield from batches(2)
        raise KilledError

    model = seeded()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KilledError):
        prune(model, data())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counting(nn.Linear):
    """Counts its calls in a buffer and adds noise in evaluation mode too."""

    def __init__(self):
        super().__init__(16, 24)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x + 1e-3 * torch.randn_like(x))


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_the_random_state_are_as_they_were(fails):
    model = seeded()
    for layer in model.layers:
        layer.left = Counting()
    if fails:
        failing(model.layers[2].out, 0)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pytest.raises(KilledError) if fails else nullcontext():
        prune(model)
    assert torch.equal(torch.rand(3), expected)
    assert [layer.left.calls.item() for layer in model.layers] == [0, 0, 0]
    assert is_24(model.layers[0].left.weight)
