"""Distillation that begins later: the teacher is the model as it has become by then."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from distilled_runs import TinyClassifier, distillation, fit
from few_steps import few_solver_steps
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from resumed_runs import assert_same, everything
from tiny_runs import StatefulLoader, quiet_trainer, tiny_loader

from prox24_lightning import Distillation, Prox24
from prox24_lightning.finetune import weights_checksum

STEPS, START = 12, 4


def test_until_then_the_run_trains_alone_and_then_from_itself():
    module, callback = TinyClassifier(), distillation(0.3, start=0.5)
    expected, teacher = copy.deepcopy(module), None
    optimizer = expected.configure_optimizers()
    for step, (x, y) in enumerate(list(tiny_loader())[:4]):
        if step == 2:
            teacher = copy.deepcopy(expected.model)
        optimizer.zero_grad()
        logits = expected.model(x)
        loss = F.cross_entropy(logits, y.argmax(-1))
        if teacher is not None:
            target = teacher(x).detach().softmax(-1)
            loss = 0.7 * loss + 0.3 * F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
        loss.backward()
        optimizer.step()
    fit(module, callback, steps=4)
    for one, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert weights_checksum(callback.teacher) == weights_checksum(teacher)
    fit(module, callback, steps=4)
    assert weights_checksum(callback.teacher) == weights_checksum(teacher), "a second fit keeps the teacher"


class AdamClassifier(TinyClassifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run(folder, ckpt_path=None):
    seed_everything(0, verbose=False)
    callbacks = [
        Prox24(START, 9, targets=["model.0", "model.2"], verbose=False),
        distillation(start=START),
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    ]
    trainer = quiet_trainer(max_steps=STEPS, max_epochs=-1, callbacks=callbacks, enable_checkpointing=True)
    module = AdamClassifier()
    with few_solver_steps():
        trainer.fit(module, StatefulLoader(tiny_loader(STEPS)), ckpt_path=ckpt_path)
    return {
        **everything(trainer, module),
        "teacher": torch.cat([p.flatten() for p in trainer.callbacks[1].teacher.parameters()]),
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("step", [2, START, 7, 11])
def test_resume(unbroken, tmp_path, step):
    folder, expected = unbroken
    assert_same(expected, run(tmp_path, folder / f"step={step}.ckpt"))


def test_a_step_that_is_none_is_refused():
    with pytest.raises(ValueError, match="start=1.5 must be a step"):
        Distillation(start=1.5)


def test_a_teacher_that_would_be_pruned_is_refused():
    with pytest.raises(MisconfigurationException, match="begins to prune it after step 1; give both the same start"):
        fit(TinyClassifier(), Prox24(1, 2, verbose=False), distillation(start=2))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    fit(TinyClassifier(), steps=3).save_checkpoint(tmp_path / "alone.ckpt")
    with pytest.raises(MisconfigurationException, match=r"of step 3 holds no teacher.* after step 2 \(start=2\)"):
        fit(TinyClassifier(), distillation(start=2), steps=6, ckpt_path=tmp_path / "alone.ckpt")
    fit(TinyClassifier(), distillation(start=2), steps=3).save_checkpoint(tmp_path / "later.ckpt")
    with pytest.raises(MisconfigurationException, match="as the model was at a later step; give start="):
        fit(TinyClassifier(), distillation(), steps=6, ckpt_path=tmp_path / "later.ckpt")
    fit(TinyClassifier(), distillation(), steps=3).save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(MisconfigurationException, match="written with another teacher: as constructed"):
        fit(TinyClassifier(), distillation(start=2), steps=6, ckpt_path=tmp_path / "first.ckpt")
