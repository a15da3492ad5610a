"""A rate at which a learned model gets worse before it is pruned is named early; the run itself stays as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from tiny_runs import StatefulLoader, quiet_trainer
from torch import nn

from prox24_lightning import Distillation, Prox24
from prox24_lightning.callbacks import rate_warning

GOOD, HIGH = 0.05, 1.0


class Network(nn.Module):
    """Finds the largest of eight features among sixteen, which it knows how to do, but for noise."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(16, 16, bias=False), nn.Dropout(0.1), nn.Linear(16, 8)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(16) + 0.01 * torch.randn(16, 16))
            self.second.weight.copy_(4 * torch.eye(8, 16))

    def forward(self, x):
        return self.second(self.drop(self.first(x)))


class Learned(LightningModule):
    def __init__(self, lr, *, scale=1.0):
        super().__init__()
        self.lr, self.scale = lr, scale
        self.network = Network()

    def training_step(self, batch, batch_idx):
        x = batch
        return self.scale * nn.functional.cross_entropy(self.network(x), x[:, :8].argmax(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class WithTargets(Learned):
    """Has the targets in the batch, where they are found."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.scale * nn.functional.cross_entropy(self.network(x), y)


class Loader(StatefulLoader):
    def __iter__(self):
        for x in super().__iter__():
            yield x, x[:, :8].argmax(1)


def fit(lr, *callbacks, steps=160, accumulate=1, ckpt_path=None, kind=WithTargets, loader=Loader, **module):
    """Return the early warnings, the trainer and the trained module."""
    torch.manual_seed(0)
    data = loader(torch.randn(steps * accumulate, 64, 16, generator=torch.Generator().manual_seed(1)))
    model = kind(lr, **module)
    trainer = quiet_trainer(max_steps=steps, callbacks=list(callbacks), accumulate_grad_batches=accumulate)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(model, data, ckpt_path=ckpt_path)
    return [str(one.message) for one in found if "has not trained on" in str(one.message)], trainer, model


def prox24(**settings):
    return Prox24(**{"start": 0.1, "freeze": 0.2, "verbose": False, **settings})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rate_that_is_too_high_is_named_before_the_start(accumulate):
    callback = prox24()
    (text,), _, _ = fit(HIGH, callback, accumulate=accumulate)
    assert text.startswith("prox24: after step 8, with nothing pruned yet, ")
    assert f"the learning rate ({HIGH:g}) is probably too high for this model; try half of it" in text
    assert callback.early_rise.is_too_high


def test_a_good_rate_is_told_nothing_but_measured():
    callback = prox24()
    assert fit(GOOD, callback)[0] == []
    assert callback.early_rise.share < 0.005
    assert callback.early_rise.rate == GOOD


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        pytest.param({"kind": Learned, "loader": StatefulLoader}, {}, id="targets that are not in the batch"),
        pytest.param({}, {"scale": 3.0}, id="another loss"),
    ],
)
def test_without_a_loss_that_is_recognised_nothing_is_measured(settings, module):
    callback = prox24()
    assert fit(HIGH, callback, **settings, **module)[0] == []
    assert callback.early_rise is None


def test_under_distillation_nothing_is_measured():
    callback = prox24()
    assert fit(HIGH, Distillation(share=0.5, verbose=False), callback)[0] == []
    assert callback.early_rise is None


def test_a_hook_that_the_copy_does_not_have_is_noticed():
    class Noisy(WithTargets):
        def __init__(self, lr):
            super().__init__(lr)
            self.network.first.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))

    callback = prox24()
    assert fit(1e-6, callback, kind=Noisy)[0] == []
    assert callback.early_rise is None


def test_a_resumed_run_has_no_start_to_compare_with(tmp_path):
    _, trainer, _ = fit(GOOD, prox24(), steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    callback = prox24()
    assert fit(GOOD, callback, ckpt_path=tmp_path / "x.ckpt")[0] == []
    assert callback.early_rise is None


def test_post_step_ends_the_comparison_at_its_start():
    callback = prox24(strategy="post_step", start=6)
    fit(GOOD, callback)
    assert callback.early_rise is None  # three batches only
    callback = prox24(strategy="post_step", start=7)
    fit(GOOD, callback)
    assert callback.early_rise.step == 7


def test_the_run_is_the_same_bit_for_bit(monkeypatch):
    _, _, measured = fit(GOOD, prox24())

    def refuse(*args):
        raise ValueError

    monkeypatch.setattr(rate_warning, "_comparison", refuse)
    callback = prox24()
    _, _, plain = fit(GOOD, callback)
    assert callback.early_rise is None
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name


def test_a_run_that_stops_in_between_leaves_no_hook():
    class Stop(Callback):
        def on_train_batch_start(self, *args):
            raise RuntimeError("stopped")

    module = WithTargets(GOOD)
    trainer = quiet_trainer(max_steps=160, callbacks=[prox24(), Stop()])
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(module, Loader(torch.randn(160, 64, 16)))
    assert not module.network._forward_hooks
    assert copy.deepcopy(module).network(torch.randn(2, 16)).shape == (2, 8)
