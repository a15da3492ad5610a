"""transformers.Trainer as the host: the same engine, the same weights for the same steps, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TinyModule, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import prox24_lightning
from prox24_lightning import Prox24, Prox24TrainerCallback, load_masks
from prox24_lightning.mask import is_24, mask_24
from prox24_lightning.sparsify.controller import SparsifyController

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*:UserWarning"),
]
STEPS, START, FREEZE = 12, 2, 8


class Samples(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(STEPS * 4, 8, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(8, 4, generator=generator))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """Gives transformers the loss that the Lightning module computes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = TinyModule().model

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.model(x), labels)}


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def train(callback, folder, resume=None, model=None, accumulate=1, kind=InOrder, **arguments):
    settings = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS // accumulate,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": 0.01,
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            **arguments,
        },
    )
    trainer = kind(model or Model(), settings, train_dataset=Samples(), eval_dataset=Samples(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_two_callbacks_need_two_names(tmp_path):
    def run(folder, *names):
        each = [
            Prox24TrainerCallback(START, FREEZE, strategy="post_step", targets=[target], verbose=False, name=name)
            for name, target in zip(names, ("model.0", "model.2"), strict=True)
        ]
        settings = TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
        )
        InOrder(Model(), settings, train_dataset=Samples(), callbacks=each).train()
        return [one.phase for one in each]

    with pytest.raises(ValueError, match="two Prox24TrainerCallback have the name 'prox24', and would write the same"):
        run(tmp_path / "one", "prox24", "prox24")
    assert run(tmp_path / "two", "first", "second") == ["frozen", "frozen"]
    assert {"first.pt", "second.pt"} <= {path.name for path in (tmp_path / "two" / f"checkpoint-{STEPS}").iterdir()}


def callback(strategy="progressive", **arguments):
    return Prox24TrainerCallback(
        START, FREEZE, strategy=strategy, targets=["model.0", "model.2"], verbose=False, **arguments
    )


def test_settings_of_calibration_reach_the_solver():
    given = {
        "token_weighting": 0.25,
        "calibration_batches": 3,
        "reconstruction_steps": 7,
        "dense_target": 0.75,
        "damping": 0.1,
    }
    for config in (callback(**given).config, Prox24(START, FREEZE, **given).config):
        assert {name: getattr(config, name) for name in given} == given
        model = Model()
        engine = SparsifyController(config).prepare(model, [torch.optim.SGD(model.parameters())], STEPS, {})
        settings = engine.strategy.settings
        assert (settings.token_weighting, settings.batches) == (0.25, 3)
        assert (settings.reconstruction_steps, settings.dense_target) == (7, 0.75)
        assert (settings.solver(model).damping, settings.solver(torch.nn.Conv2d(4, 4, 3)).damping) == (0.1, 0.1)
    with pytest.raises(ValueError, match="token_weighting='1' must lie in"):
        callback(token_weighting="1")
    with pytest.raises(ValueError, match=r"damping=0 must lie in \(0, 1\]"):
        callback(damping=0)


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_both_hosts_give_the_same_weights(tmp_path, strategy):
    mine = callback(strategy)
    theirs = Prox24(START, FREEZE, strategy=strategy, targets=["model.0", "model.2"], verbose=False)
    model = train(mine, tmp_path).model
    torch.manual_seed(0)
    module = TinyModule("adam")
    data = TensorDataset(Samples().x, Samples().y)
    quiet_trainer(max_steps=STEPS, callbacks=[theirs]).fit(module, DataLoader(data, 4))
    assert mine.phase == theirs.phase == "frozen"
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in module.named_parameters())
    assert all(torch.equal(mine.masks[name], mask) for name, mask in theirs.masks.items())


@pytest.mark.parametrize("step", [1, 5, 10])
@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, strategy, step):
    whole = train(callback(strategy), tmp_path).model.state_dict()
    again = train(callback(strategy), tmp_path, resume=str(tmp_path / f"checkpoint-{step}")).model.state_dict()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


class Interrupt(TrainerCallback):
    """Ctrl-C after a step, once."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [5, 10])
def test_a_trainer_that_was_interrupted_goes_on_in_the_same_process(tmp_path, step):
    finished = train(callback("post_step"), tmp_path)
    whole, callbacks = finished.model.state_dict(), [callback("post_step"), Interrupt(step)]
    trainer = InOrder(Model(), finished.args, train_dataset=Samples(), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = trainer.model.state_dict()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())


def test_steps_are_optimizer_steps_and_hooks_are_gone(tmp_path):
    mine = callback()
    model = train(mine, tmp_path, accumulate=1, max_steps=FREEZE + 1, gradient_accumulation_steps=2).model
    assert (mine.step, mine.phase) == (FREEZE + 1, "frozen")
    assert all(is_24(weight.parameter) for weight in mine.weights)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_masks_go_to_their_file(tmp_path):
    mine = callback(masks_file=tmp_path / "masks.safetensors")
    model = train(mine, tmp_path / "run", save_steps=100).model
    assert load_masks(model, tmp_path / "masks.safetensors", expect="same").masks.keys() == mine.masks.keys()


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_the_best_checkpoint_is_the_best_since_the_freeze(tmp_path, strategy):
    class GetsWorse(InOrder):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    mine = callback(strategy, masks_file=tmp_path / "masks.safetensors")
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = train(mine, tmp_path / "run", kind=GetsWorse, **best)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{FREEZE}")
    assert all(is_24(weight.parameter) for weight in mine.weights)
    assert load_masks(trainer.model, tmp_path / "masks.safetensors", expect="same").masks.keys() == mine.masks.keys()


def test_the_patience_of_early_stopping_begins_anew_at_the_freeze(tmp_path):
    """The loss rises while weights go 2:4; of the patience of seven evaluations six are gone before the freeze."""
    stopping, counts = EarlyStoppingCallback(early_stopping_patience=7), {}

    class Rises(InOrder):
        def evaluate(self, *args, **kwargs):
            step = self.state.global_step
            metrics = {"eval_loss": 2.0 + step / 100 if step > START else 1.0 - step / 100}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            counts[step] = stopping.early_stopping_patience_counter
            return metrics

        def __init__(self, *args, callbacks, **kwargs):
            super().__init__(*args, callbacks=[*callbacks, stopping], **kwargs)

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best["metric_for_best_model"] = "eval_loss"
    trainer = train(callback(), tmp_path, kind=Rises, **best)
    assert trainer.state.global_step == STEPS
    assert counts == {1: 0, 2: 0, **{step: step - START for step in range(START + 1, FREEZE)}} | {
        step: step - FREEZE for step in range(FREEZE, STEPS + 1)
    }


def test_a_checkpoint_that_was_written_without_the_callback_is_reported(tmp_path):
    train(TrainerCallback(), tmp_path, max_steps=5)
    mine = callback()
    with (
        pytest.warns(UserWarning, match="name the checkpoint's folder as resume_from"),
        pytest.warns(UserWarning, match="going on from step 5 as sparsify"),
    ):
        train(mine, tmp_path, resume=str(tmp_path / "checkpoint-5"))
    assert mine.phase == "frozen"


def test_what_does_not_fit_is_refused_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="freeze=100 is beyond the run, which has 12 optimizer steps"):
        train(Prox24TrainerCallback(2, 100, verbose=False), tmp_path)


def test_the_zeros_of_a_model_are_kept(tmp_path):
    model = Model()
    with torch.no_grad():
        model.model[0].weight.mul_(mask_24(model.model[0].weight))
    before = model.model[0].weight == 0
    callback = Prox24TrainerCallback(strategy="keep", verbose=False)
    train(callback, tmp_path, model=model)
    assert list(callback.masks) == ["model.0.weight"]
    assert (model.model[0].weight == 0).equal(before)


@pytest.mark.parametrize("name", ["Prox24", "SparsityMonitor", "Distillation", "RoundWeights"])
def test_in_lightning_the_callback_for_it_is_named(name):
    kind = getattr(prox24_lightning, f"{name}TrainerCallback")
    callback = kind.__new__(kind)  # most take the transformers.Trainer
    with pytest.raises(TypeError, match=f"{name}TrainerCallback is for transformers.Trainer; .* takes {name}$"):
        quiet_trainer(max_steps=1, callbacks=[callback]).fit(TinyModule(), DataLoader(TensorDataset(torch.ones(2, 8))))
