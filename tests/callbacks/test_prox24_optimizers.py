"""Optimizers that remember, wrap or mix: what Prox24 writes lasts, pruned weights stay zero, each step counts once."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from odd_optimizers import MasterList, Masters, Orthogonal, OuterMasters, ScheduleFree, SharpnessAware, SlowWeights
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24

TARGETS = ["model.0", "model.2"]


def public(package, name, *wrapped):
    """Make an optimizer of a package that need not be installed, around ``wrapped`` if that is given."""

    def make(parameters, lr):
        cls = getattr(pytest.importorskip(package), name)
        return cls(wrapped[0](parameters, lr=lr)) if wrapped else cls(parameters, lr=lr)

    return make


REMEMBERING = {
    "masters": Masters,
    "masters in a list": MasterList,
    "masters outside of the model": lambda p, lr: OuterMasters(p, lr=lr, momentum=0.9),
    "slow weights": lambda p, lr: SlowWeights(torch.optim.AdamW(p, lr=lr)),
    "schedule-free": ScheduleFree,
    "orthogonal": Orthogonal,
    "pytorch_optimizer.Lookahead": public("pytorch_optimizer", "Lookahead", torch.optim.AdamW),
    "pytorch_optimizer.MADGRAD": public("pytorch_optimizer", "MADGRAD"),
    "pytorch_optimizer.SOAP": public("pytorch_optimizer", "SOAP"),
    "schedulefree.AdamW": public("schedulefree", "AdamWScheduleFree"),
}


class Module(TinyModule):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=1e-6)
        getattr(optimizer, "train", lambda: None)()
        return optimizer


class Remember(Callback):
    """The weights after each step."""

    def __init__(self, prox):
        self.prox = prox
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen[self.prox.step] = {w.name: w.parameter.detach().clone() for w in self.prox.weights}


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_what_was_written_into_the_surviving_weights_lasts(name, strategy):
    prox = Prox24(4, 8, strategy=strategy, targets=TARGETS, verbose=False)
    remember, module = Remember(prox), Module(REMEMBERING[name])
    trainer = quiet_trainer(max_steps=20, max_epochs=-1, callbacks=[prox, remember])
    trainer.fit(module, tiny_loader())
    for weight in prox.weights:
        mask = prox.masks[weight.name]
        before, frozen = remember.seen[3][weight.name], remember.seen[8][weight.name]
        assert (frozen - before)[mask].abs().max() > 1e-3 or strategy == "post_step"
        torch.testing.assert_close(weight.parameter.detach(), frozen, rtol=1e-3, atol=1e-3)
        assert all((remember.seen[step][weight.name][~mask] == 0).all() for step in range(8, 21))
    getattr(trainer.optimizers[0], "eval", lambda: None)()
    for weight in prox.weights:
        assert (weight.parameter[~prox.masks[weight.name]] == 0).all(), "the averaged weights are pruned as well"


class TwoPasses(TinyModule):
    """SAM as its readme has it: two backward passes, two half steps."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        sam = self.optimizers()
        for half in (sam.first_step, sam.second_step):
            self.manual_backward(super().training_step(batch, batch_idx))
            half()

    def configure_optimizers(self):
        return SharpnessAware(self.parameters(), torch.optim.AdamW, lr=0.01)


def test_sharpness_aware_minimisation_counts_a_step_a_batch():
    prox = Prox24(2, 8, targets=TARGETS, verbose=False)
    quiet_trainer(max_steps=-1, max_epochs=2, callbacks=[prox]).fit(TwoPasses(), tiny_loader())
    assert (prox.step, prox.phase) == (16, "frozen")
    assert all(is_24(weight.parameter) for weight in prox.weights)


class OutsideOfStep(TinyModule):
    """Updates its weights without ever calling an optimizer's step."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
        self.zero_grad()


def test_updates_that_no_step_announces_stop_the_run_early():
    prox = Prox24(2, 8, targets=TARGETS, verbose=False)
    with pytest.raises(RuntimeError, match=r"none of the optimizers \(AdamW\) has announced a step"):
        quiet_trainer(max_steps=-1, max_epochs=2, callbacks=[prox]).fit(OutsideOfStep(), tiny_loader())


def test_an_infinite_gradient_at_a_pruned_entry_is_clipped_as_in_the_dense_run():
    class Overflows(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            large = (self.model[0].weight * 3e38).sum()
            return loss + large + large if self.global_step == 10 else loss

    prox = Prox24(2, 6, targets=TARGETS, verbose=False)
    clip = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    module = Overflows()
    quiet_trainer(max_steps=14, max_epochs=-1, callbacks=[prox], **clip).fit(module, tiny_loader())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("width", [16, 24])
def test_a_preconditioner_is_no_moment_of_the_weight(width):
    module = TinyModule(width=width)
    module.configure_optimizers = lambda: public("pytorch_optimizer", "Shampoo")(module.parameters(), lr=1e-3)
    trainer = quiet_trainer(max_steps=10, max_epochs=-1, callbacks=[Prox24(4, 6, verbose=False)])
    trainer.fit(module, tiny_loader())
    outer = trainer.optimizers[0].state[module.model[2].weight]["pre_cond_0"]
    assert (outer != 0).all()
    assert torch.linalg.eigvalsh(outer)[0] > -1e-6


class Save(Callback):
    """Writes one checkpoint, once."""

    def __init__(self, folder, step):
        self.path, self.step = folder / f"{step}.ckpt", step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [6, 9])
@pytest.mark.parametrize("name", ["masters", "schedule-free"])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, name, step):
    def run(resume=None):
        torch.manual_seed(0)
        module = Module(lambda p, lr: REMEMBERING[name](p, lr=0.05))
        callbacks = [Prox24(4, 8, targets=TARGETS, verbose=False), Save(tmp_path, step)]
        trainer = quiet_trainer(max_steps=12, max_epochs=-1, callbacks=callbacks)
        trainer.fit(module, StatefulLoader(tiny_loader(batches=12)), ckpt_path=resume)
        return {**module.state_dict(), **trainer.optimizers[0].state_dict()["state"][0]}

    whole = run()
    again = run(tmp_path / f"{step}.ckpt")
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
