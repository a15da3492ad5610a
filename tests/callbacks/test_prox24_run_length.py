"""A fraction of the run is a fraction of its real steps, however often the module steps."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24

EPOCHS, BATCHES = 5, 20


class Manual(TinyModule):
    """Steps every ``every``-th batch, with one optimizer or two, through Lightning's wrappers or not."""

    def __init__(self, every=1, optimizers=1, wrapped=True):
        super().__init__()
        self.every, self.count, self.wrapped = every, optimizers, wrapped
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(nn.functional.mse_loss(self.model(batch[0]), batch[1]))
        optimizers = self.optimizers(use_pl_optimizer=self.wrapped)
        for optimizer in optimizers if self.count > 1 else [optimizers]:
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        if self.count == 1:
            return torch.optim.AdamW(self.parameters(), 1e-3)
        matrices = [p for p in self.parameters() if p.dim() > 1]
        return [torch.optim.AdamW(matrices), torch.optim.SGD([p for p in self.parameters() if p.dim() < 2], 0.1)]


class Seldom(TinyModule):
    """Leaves every second of Lightning's steps out."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class Accumulates(Callback):
    """Sets the accumulation of the trainer while it runs, as some recipes do."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 4


class Watch(Callback):
    def __init__(self, prox):
        self.prox, self.frozen_after = prox, None

    def on_train_batch_end(self, trainer, *args):
        if self.frozen_after is None and self.prox.phase == "frozen":
            self.frozen_after = trainer.fit_loop.total_batch_idx + 1


def frozen_after(module, *more, start=0.5, freeze=0.5, strategy="post_step", **arguments):
    prox = Prox24(start, freeze, strategy=strategy, metric="weight", verbose=False)
    watch = Watch(prox)
    arguments = {"max_steps": -1, "max_epochs": EPOCHS, **arguments}
    quiet_trainer(callbacks=[prox, watch, *more], **arguments).fit(module, tiny_loader(BATCHES))
    assert prox.phase == "frozen"
    return watch.frozen_after


@pytest.mark.parametrize(
    "module, more",
    [
        (Manual(), []),
        (Manual(optimizers=2), []),
        (Manual(optimizers=2, wrapped=False), []),
        (Manual(every=4), []),
        (Seldom(), []),
        (TinyModule(), [GradientAccumulationScheduler({0: 4})]),
        (TinyModule(), [Accumulates()]),
    ],
    ids=["manual", "two", "two bare", "every fourth", "optimizer_step", "scheduler", "set by a callback"],
)
def test_half_of_the_run_is_half_of_its_steps(module, more):
    assert frozen_after(module, *more) in range(48, 53)


def test_changing_accumulation_that_is_known_is_counted_exactly():
    # 5 + 5 + 20 + 20 + 20 steps: half of 70 is the fifth step of the fourth epoch.
    assert frozen_after(TinyModule(), GradientAccumulationScheduler({0: 4, 2: 1})) == 65


def test_whole_steps_count_every_optimizer():
    assert frozen_after(Manual(optimizers=2), start=100, freeze=150) == 75


@pytest.mark.filterwarnings("ignore:freeze=1.0 is the end of the run")
@pytest.mark.parametrize("freeze", [1.0, 90])
def test_a_freeze_at_the_end_of_the_run_is_never_missed(freeze):
    assert frozen_after(Manual(every=4), start=0.5, freeze=freeze) == EPOCHS * BATCHES


def test_progressive_learns_the_length_as_well():
    assert frozen_after(Manual(every=2), strategy="progressive", start=0.1, freeze=0.5) in range(48, 53)


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("plan", [(100, 200), (0.5, 0.9), (1000, 1000)])
def test_fast_dev_run_takes_whole_steps(strategy, plan):
    prox = Prox24(*plan, strategy=strategy, verbose=False)
    quiet_trainer(max_steps=-1, max_epochs=3, fast_dev_run=2, callbacks=[prox]).fit(TinyModule(), tiny_loader())
    assert prox.phase == "frozen"


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Using ModelCheckpoint with manual optimization")
def test_a_resumed_run_has_learned_what_the_unbroken_one_has(tmp_path):
    data = list(tiny_loader(40))

    class ByIndex(Manual):  # Lightning saves no place in the data between two steps of manual optimisation
        def training_step(self, batch, batch_idx):
            super().training_step(data[batch_idx], batch_idx)

    def run(folder, resume=None):
        torch.manual_seed(0)
        prox, module = Prox24(0.2, 0.6, strategy="post_step", verbose=False), ByIndex(every=3)
        save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        quiet_trainer(max_steps=-1, max_epochs=1, callbacks=[prox, save], enable_checkpointing=True).fit(
            module, StatefulLoader(tiny_loader(40)), ckpt_path=resume
        )
        return prox, module

    prox, module = run(tmp_path)
    again, resumed = run(tmp_path / "resumed", tmp_path / "step=5.ckpt")
    assert (prox.start_step, prox.freeze_step) == (again.start_step, again.freeze_step)
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
