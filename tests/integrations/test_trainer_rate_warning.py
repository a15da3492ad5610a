"""The warning of a learning rate that is too high in transformers.Trainer, from the losses that it logs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from prox24_lightning import DistillationTrainerCallback, Prox24TrainerCallback, RoundWeightsTrainerCallback

STEPS = 64


class Noise(Dataset):
    def __init__(self):
        self.x = torch.randn(STEPS * 32, 2, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index, 0], "labels": self.x[index, 0] + self.x[index, 1]}


class Trained(nn.Module):
    """A linear map that is learned already, up to noise in its targets."""

    def __init__(self):
        super().__init__()
        self.model, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.eye_(self.model.weight)
        nn.init.eye_(self.other.weight)

    def forward(self, x, labels):
        logits = self.model(x)
        loss = nn.functional.mse_loss(logits, labels) + 1e-3 * nn.functional.mse_loss(self.other(x), labels)
        return {"loss": loss, "logits": logits}


def sparse(name="prox24", *targets):
    return Prox24TrainerCallback(start=8, freeze=16, name=name, targets=targets or None, verbose=False)


def fit(
    folder,
    rate,
    *callbacks,
    every=1,
    add=None,
    text="the training loss has risen",
    steps=STEPS,
    kind=Trainer,
    **further,
):
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=further.pop("warmup_steps", 24),
        logging_steps=every,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
        max_grad_norm=0.0,
        **further,
    )
    trainer = kind(Trained(), settings, train_dataset=Noise(), callbacks=list(callbacks or [sparse()]))
    if add is not None:
        trainer.add_callback(add(trainer))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in found if text in str(warning.message)]


@pytest.mark.parametrize("every", [1, 2])
def test_a_rate_that_diverges_is_named_once(tmp_path, every):
    (text,) = fit(tmp_path, 12.0, every=every)
    assert text.startswith("prox24: the training loss has risen to ")
    assert "(steps 1 to 8) at the start" in text
    assert "set half of it (6)" in text


def test_a_good_rate_is_not(tmp_path):
    assert fit(tmp_path, 1.0) == []


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda trainer: RoundWeightsTrainerCallback(trainer, start=60, verbose=False), id="rounded"),
        pytest.param(lambda trainer: DistillationTrainerCallback(trainer, 1e-3, loss="mse"), id="distilled"),
    ],
)
def test_a_loss_that_a_callback_changes_tells_nothing(tmp_path, add):
    assert fit(tmp_path, 12.0, add=add) == []


def test_two_of_them_say_nothing(tmp_path):
    assert fit(tmp_path, 12.0, sparse("a", "model"), sparse("b", "other")) == []


def test_what_is_logged_after_the_run_tells_nothing(tmp_path):
    trainers = []

    def keep(trainer):
        trainers.append(trainer)
        return TrainerCallback()

    fit(tmp_path, 1.0, add=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(32):
            trainers[0].log({"loss": 9.0})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_that_gets_worse_before_it_is_pruned_is_named_early(tmp_path, accumulate):
    settings = {
        "steps": 160,
        "warmup_steps": 4,
        "gradient_accumulation_steps": accumulate,
        "text": "has not trained on",
    }
    callback = sparse()
    (text,) = fit(tmp_path, 12.0, callback, **settings)
    assert text.startswith("prox24: after step 8, with nothing pruned yet, ")
    assert "try half of it" in text
    assert callback.early_rise.is_too_high
    callback = sparse()
    assert fit(tmp_path, 0.3, callback, **settings) == []
    assert callback.early_rise.share < 0.01


def test_under_distillation_nothing_is_measured(tmp_path):
    callback = sparse()

    def add(trainer):
        return DistillationTrainerCallback(trainer, 1e-3, loss="mse")

    assert fit(tmp_path, 12.0, callback, steps=160, warmup_steps=4, add=add, text="has not trained on") == []
    assert callback.early_rise is None


def test_another_loss_than_the_models_own_is_not_measured(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return nn.functional.l1_loss(model(**inputs)["logits"], inputs["labels"])

    callback = sparse()
    assert fit(tmp_path, 1.0, callback, steps=160, kind=Weighted, text="has not trained on") == []
    assert callback.early_rise is None


def test_a_run_that_an_error_ends_leaves_no_hook(tmp_path):
    class Full(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            models.append(self.model)
            if self.state.global_step == 5:
                raise RuntimeError("out of memory")
            return loss

    models, callback = [], sparse()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, 0.3, callback, steps=160, kind=Full)
    assert not models[0]._forward_hooks
    assert not models[0]._forward_pre_hooks
    assert fit(tmp_path, 0.3, callback, steps=160, text="has not trained on") == []
    assert callback.early_rise.share < 0.01
