"""Invariant 3: after the freeze a pruned weight is exactly zero everywhere, and the rest trains on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24, violations_24

TARGETS = ["model.0", "model.2"]


class Watch(Callback):
    """Looks at weights, gradients and optimizer state of the frozen phase at every point where others could."""

    def __init__(self, prox):
        self.prox = prox
        self.looks = 0
        self.moved = False

    def pruned(self):
        for weight in self.prox.weights:
            if weight.name in self.prox.masks:
                yield weight.parameter, ~self.prox.masks[weight.name]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter, gone in self.pruned():
            assert (parameter.grad[gone] == 0).all()

    def on_train_batch_end(self, trainer, pl_module, *args):
        for parameter, gone in self.pruned():
            self.looks += 1
            assert (parameter[gone] == 0).all()
            for value in trainer.optimizers[0].state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    assert (value[gone] == 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamw_fused"])
@pytest.mark.parametrize("strategy", ["post_step", "progressive"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pruned_weights_gradients_and_state_are_zero(optimizer, strategy, accumulate):
    callback, module = Prox24(2, 6, strategy=strategy, targets=TARGETS, verbose=False), TinyModule(optimizer)
    watch = Watch(callback)
    at_freeze = {}

    class Remember(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if callback.step == 6 and not at_freeze:
                at_freeze.update({w.name: w.parameter.detach().clone() for w in callback.weights})

    trainer = quiet_trainer(
        max_steps=16,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, Remember(), watch],
        gradient_clip_val=1.0,
    )
    trainer.fit(module, tiny_loader())
    assert watch.looks >= 20
    for weight in callback.weights:
        mask = callback.masks[weight.name]
        assert is_24(weight.parameter)
        assert mask.float().mean() == 0.5
        assert (weight.parameter[mask] != at_freeze[weight.name][mask]).any(), "survivors train on"


def averaged(cls, **arguments):
    callback, module = Prox24(2, 10, targets=TARGETS, verbose=False), TinyModule()
    average = cls(**arguments)
    trainer = quiet_trainer(max_steps=-1, max_epochs=4, callbacks=[average, callback])
    trainer.fit(module, tiny_loader(batches=6))
    return callback, module, trainer


@pytest.mark.parametrize("first", [1, 12])
def test_exponential_averages_of_the_weights_are_24(first, tmp_path):
    callback, _, trainer = averaged(EMAWeightAveraging, decay=0.5, update_starting_at_step=first)
    assert all(is_24(weight.parameter) for weight in callback.weights)
    path = tmp_path / "ema.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert is_24(saved["model.2.weight"])


@pytest.mark.parametrize("epoch", [1, 3])
def test_stochastic_weight_averaging_is_24(epoch):
    callback, _, _ = averaged(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=epoch)
    assert all(is_24(weight.parameter) for weight in callback.weights)


def test_every_saved_checkpoint_after_the_freeze_is_24(tmp_path):
    callback = Prox24(2, 6, targets=TARGETS, verbose=False)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(max_steps=10, callbacks=[callback, checkpoint], enable_checkpointing=True)
    trainer.fit(TinyModule(), tiny_loader(batches=10))
    for step in range(6, 11):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert all(is_24(saved[f"{name}.weight"]) for name in TARGETS)


def test_one_shot_in_the_middle_and_before_the_first_step():
    for step in (0, 5):
        callback = Prox24(step, step, strategy="post_step", metric="weight", targets=TARGETS, verbose=False)
        watch = Watch(callback)
        quiet_trainer(max_steps=8, callbacks=[callback, watch]).fit(TinyModule(), tiny_loader())
        assert callback.phase == "frozen"
        assert watch.looks == 2 * (8 - max(step - 1, 0))


def test_restore_puts_the_survivors_back():
    class Still(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback, module = Prox24(0, 8, strategy="post_step", refit="restore", targets=TARGETS, verbose=False), Still()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    quiet_trainer(max_steps=8, callbacks=[callback]).fit(module, tiny_loader())
    for weight in callback.weights:
        assert torch.equal(weight.parameter, before[weight.name] * callback.masks[weight.name])


def test_columns_can_be_the_groups():
    callback, module = Prox24(0, 4, geometry="column", targets=TARGETS, verbose=False), TinyModule()
    quiet_trainer(max_steps=6, callbacks=[callback]).fit(module, tiny_loader())
    assert all(is_24(weight.parameter, dim=0) for weight in callback.weights)


def test_a_write_into_frozen_weights_is_reported():
    callback = Prox24(0, 2, targets=TARGETS, verbose=False)

    class Vandal(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.model[2].weight.fill_(1.0)

    with pytest.warns(UserWarning, match=r"model.2.weight is frozen, yet .*: 64 of 64 groups"):
        quiet_trainer(max_steps=4, callbacks=[Vandal(), callback]).fit(TinyModule(), tiny_loader())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class TwoBlocks(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(8, 4))


class Broken(Callback):
    """Where a weight that was 2:4 at the end of a batch no longer is."""

    def __init__(self) -> None:
        self.frozen: set[str] = set()
        self.found: list[tuple[int, str]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = {n for n, p in pl_module.named_parameters() if "up.weight" in n and not violations_24(p.detach())}
        self.found += [(trainer.global_step, name) for name in self.frozen - now]
        self.frozen |= now


def test_the_reconstruction_of_a_block_leaves_what_another_prox24_froze():
    torch.manual_seed(0)
    first = Prox24(1, 3, targets=["*up*"], name="first", verbose=False)
    second = Prox24(4, 8, targets=["*down*"], name="second", verbose=False)
    look = Broken()
    quiet_trainer(max_steps=10, callbacks=[first, second, look]).fit(TwoBlocks(), tiny_loader(batches=10))
    assert len(look.frozen) == 2
    assert look.found == []
