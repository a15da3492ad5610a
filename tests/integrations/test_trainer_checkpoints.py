"""Checkpoints of transformers: weights that are lost are never written, and a state never belongs to other weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer_callback import InOrder, Interrupt, Model, Samples, callback, train
from transformers import Trainer, TrainerCallback

from prox24_lightning import is_24

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*:UserWarning"),
]


class NanFrom(Model):
    """Its loss is NaN from a training batch on."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.seen = batch, 0

    def forward(self, x, labels):
        self.seen += self.training
        return {"loss": super().forward(x, labels)["loss"] * (float("nan") if self.seen >= self.batch else 1.0)}


def folders(path):
    return sorted(folder.name for folder in path.glob("checkpoint-*"))


EVALUATE = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}


@pytest.mark.parametrize(
    "settings",
    [
        {"save_total_limit": 1, "save_steps": 3},
        {"save_total_limit": 1, "save_steps": 3, **EVALUATE, "load_best_model_at_end": True},
        {"save_total_limit": 1, "save_strategy": "best", **EVALUATE},
        {"save_total_limit": 1, "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 4, "train_batch": 16},
    ],
)
def test_lost_weights_stop_the_run_before_they_are_written(tmp_path, settings):
    batch = settings.pop("train_batch", 4)
    with pytest.raises(RuntimeError, match=r"weights are NaN or infinite after step \d+ .*nothing is saved"):
        train(callback(), tmp_path, model=NanFrom(5), per_device_train_batch_size=batch, **settings)
    assert folders(tmp_path) == ["checkpoint-3"]
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert (tmp_path / "checkpoint-3" / "prox24.pt").exists()


class InterruptSaving(TrainerCallback):
    """Stops between what transformers writes of a checkpoint and what stands after this callback writes."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train_with(callbacks, finished):
    """A trainer of a new model with the settings of another one."""
    return InOrder(Model(), finished.args, train_dataset=Samples(), callbacks=callbacks)


@pytest.mark.parametrize("strategy, step", [("progressive", 5), ("progressive", 10), ("post_step", 5)])
def test_a_kill_between_the_files_of_a_checkpoint_loses_nothing(tmp_path, strategy, step):
    whole = train(callback(strategy), tmp_path / "whole")
    whole.args.output_dir = str(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        train_with([InterruptSaving(step), callback(strategy)], whole).train()
    folder = tmp_path / "killed" / f"checkpoint-{step}"
    assert not (folder / "prox24.pt").exists()
    for _ in range(2):  # the second time from what the first has completed
        again = train_with([callback(strategy)], whole)
        again.train(resume_from_checkpoint=str(folder))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), name
        assert (folder / "prox24.pt").exists()


def test_a_state_that_is_missing_is_refused_with_the_newest_whole_checkpoint(tmp_path):
    train(callback(), tmp_path, max_steps=9)
    (tmp_path / "checkpoint-5" / "prox24.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-5 holds no state of prox24 .* resume from .*checkpoint-\d, or"):
        train(callback(), tmp_path, resume=str(tmp_path / "checkpoint-5"))


def test_a_state_beside_other_weights_is_refused(tmp_path):
    train(callback(), tmp_path, max_steps=9)
    file = tmp_path / "checkpoint-5" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no state of prox24 that belongs to its weights"):
        train(callback(), tmp_path, resume=str(tmp_path / "checkpoint-5"))
    mine = callback(resume_from=tmp_path / "checkpoint-5")
    train(mine, tmp_path, resume=str(tmp_path / "checkpoint-5"))
    assert mine.step == 12


def test_an_earlier_runs_state_does_not_outlive_its_checkpoint(tmp_path):
    finished = train(callback(), tmp_path)
    assert (tmp_path / "checkpoint-5" / "prox24.pt").exists()
    with pytest.raises(KeyboardInterrupt):
        train_with([InterruptSaving(5), callback()], finished).train()
    assert not (tmp_path / "checkpoint-5" / "prox24.pt").exists()


def test_a_damaged_state_is_named(tmp_path):
    train(callback(), tmp_path, max_steps=9)
    path = tmp_path / "checkpoint-5" / "prox24.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"prox24\.pt is damaged and cannot be read"):
        train(callback(), tmp_path, resume=str(tmp_path / "checkpoint-5"))


class SaveAt(TrainerCallback):
    """Asks for a checkpoint after all other callbacks."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step == self.step


def test_a_checkpoint_that_a_later_callback_asks_for_has_its_state(tmp_path):
    whole = train(callback(), tmp_path, save_steps=100)
    train_with([callback(), SaveAt(5)], whole).train()
    again = train_with([callback()], whole)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_best_checkpoint_that_was_not_written_leaves_no_state(tmp_path):
    train(callback(), tmp_path, save_strategy="best", **{**EVALUATE, "metric_for_best_model": "eval_runtime"})
    assert not (tmp_path / "prox24-pending.pt").exists()
    assert all((folder / "prox24.pt").exists() for folder in tmp_path.glob("checkpoint-*"))


def test_a_run_resumed_from_its_last_step_writes_its_masks(tmp_path):
    train(callback(), tmp_path)
    mine = callback(masks_file=tmp_path / "masks.safetensors")
    train(mine, tmp_path, resume=str(tmp_path / "checkpoint-12"))
    assert (tmp_path / "masks.safetensors").exists()
    assert all(is_24(weight.parameter) for weight in mine.weights)


def test_an_interrupted_run_can_be_evaluated(tmp_path):
    finished = train(callback(), tmp_path, save_steps=100)
    trainer = Trainer(
        Model(), finished.args, train_dataset=Samples(), eval_dataset=Samples(), callbacks=[callback(), Interrupt(5)]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
