"""Distillation beside Prox24: N steps in one go, and with a crash in between, are the same bit for bit."""

from __future__ import annotations

import pytest
import torch
from distilled_runs import TinyClassifier, distillation
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from new_processes import spawn
from resumed_runs import STEPS as BATCHES
from resumed_runs import assert_same, everything
from tiny_runs import StatefulLoader, quiet_trainer, tiny_loader

from prox24_lightning import Prox24
from prox24_lightning.finetune import weights_checksum

STEPS = 32


class AdamClassifier(TinyClassifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run(folder, ckpt_path=None):
    seed_everything(0, verbose=False)
    callbacks = [
        Prox24(8, 20, targets=["model.0", "model.2"], verbose=False),
        distillation(),
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    ]
    trainer = quiet_trainer(max_steps=STEPS, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True)
    module = AdamClassifier()
    trainer.fit(module, StatefulLoader(tiny_loader(BATCHES)), ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, everything(*run(folder))


@pytest.mark.filterwarnings("ignore:The dirpath has changed from", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("step", [3, 14, 26])
def test_resume(unbroken, tmp_path, step):
    folder, expected = unbroken
    trainer, module = run(tmp_path, ckpt_path=folder / f"step={step}.ckpt")
    assert_same(expected, everything(trainer, module))
    seed_everything(0, verbose=False)
    assert weights_checksum(trainer.callbacks[1].teacher) == weights_checksum(AdamClassifier().model)


# Every step sees all samples, whoever has which of them.
EVERYWHERE = {"max_steps": 4, "max_epochs": -1}


def seeded():
    torch.manual_seed(0)
    return TinyClassifier()


def fit_on_one_of_two(rank, folder):
    double = seeded()
    trainer = quiet_trainer(**EVERYWHERE, devices=2, strategy="ddp", callbacks=[distillation()])
    trainer.fit(double, tiny_loader(batches=2, batch_size=16))
    torch.save(double.state_dict(), folder / f"rank{rank}.pt")


def test_two_ranks_give_the_run_of_one_with_their_batches_together(tmp_path):
    single = seeded()
    quiet_trainer(**EVERYWHERE, callbacks=[distillation()]).fit(single, tiny_loader(batches=1, batch_size=32))
    spawn(fit_on_one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in single.named_parameters():
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(first[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")
