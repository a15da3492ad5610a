"""A loss that rises after the freeze gives the warning of a learning rate that is too high; others give none."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from tiny_runs import StatefulLoader, quiet_trainer
from torch import nn

from prox24_lightning import Distillation, Prox24, RoundWeights

GOOD, DIVERGES = 1.0, 12.0


class Trained(LightningModule):
    """A linear map that is learned already, up to noise in its targets, with a warm-up of 24 steps."""

    def __init__(self, lr, *, manual=False):
        super().__init__()
        self.lr, self.automatic_optimization = lr, not manual
        self.model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        for layer in self.model:
            nn.init.eye_(layer.weight)

    def training_step(self, batch, batch_idx):
        x, noise = batch
        loss = sum(nn.functional.mse_loss(layer(x), x + noise) for layer in self.model) / 2
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 2 * self.lr)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 24))
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


class OtherLoss(Callback):
    changes_loss = True


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return StatefulLoader(torch.randn(count, 2, 32, 16, generator=generator))


def fit(lr, *callbacks, steps=40, accumulate=1, ckpt_path=None, **module):
    """Return the warnings of the rate."""
    trainer = quiet_trainer(max_steps=steps, callbacks=list(callbacks), accumulate_grad_batches=accumulate)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(Trained(lr, **module), batches(steps * accumulate), ckpt_path=ckpt_path)
    return [str(warning.message) for warning in found if "the training loss has risen" in str(warning.message)], trainer


def prox24(name="prox24", freeze=16, **settings):
    return Prox24(start=8, freeze=freeze, name=name, verbose=False, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rate_that_diverges_is_named_once(accumulate):
    rate = DIVERGES * (1.2 if accumulate == 2 else 1)  # accumulation lowers the noise of a step
    (text,), _ = fit(rate, prox24(), steps=56, accumulate=accumulate)
    assert text.startswith("prox24: the training loss has risen to ")
    assert "(steps 33 to 40)" in text
    assert ", above 1.0" in text  # the noise of the targets
    assert "(steps 1 to 8) at the start" in text
    assert f"set half of it ({rate:g})" in text


@pytest.mark.parametrize("freeze", [8, 16])
def test_a_good_rate_is_not(freeze):
    assert fit(GOOD, prox24(freeze=freeze))[0] == []


def test_manual_optimisation_is_left_alone():
    assert fit(DIVERGES, prox24(), manual=True)[0] == []


def test_a_loss_that_a_callback_changes_tells_nothing():
    assert fit(DIVERGES, prox24(), OtherLoss())[0] == []
    assert Distillation.changes_loss
    assert RoundWeights.changes_loss


def test_a_loss_that_the_module_changes_tells_nothing(monkeypatch):
    monkeypatch.setattr(Trained, "changes_loss", True, raising=False)
    assert fit(DIVERGES, prox24())[0] == []


def test_one_warns_after_a_run_in_which_the_other_did():
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stopped")

    first, second = prox24("first", targets=["model.0"]), prox24("second", targets=["model.1"])
    with pytest.raises(RuntimeError, match="stopped"):
        fit(DIVERGES, first, second, Stop())
    (text,), _ = fit(DIVERGES, second, first, steps=56)
    assert text.startswith("second: ")


def test_with_two_of_them_both_are_frozen_and_one_warns():
    first, second = prox24("first", targets=["model.0"]), prox24("second", freeze=18, targets=["model.1"])
    (text,), _ = fit(DIVERGES, first, second, steps=56)
    assert text.startswith("first: ")
    assert "(steps 35 to 42)" in text


def test_a_resumed_run_that_goes_well_is_told_nothing(tmp_path):
    _, trainer = fit(GOOD, prox24(), steps=20)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert fit(GOOD, prox24(), steps=60, ckpt_path=tmp_path / "x.ckpt")[0] == []
