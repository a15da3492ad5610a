"""Fine-tuning that sees the rounding to 8 bits: when layers are rounded, and what a run leaves as it was."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from resumed_runs import assert_same, everything, run
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Distillation, Prox24, RoundWeights, is_24, mask_24
from prox24_lightning.weights.rounding import expand_rows, round_rows, round_tokens

FORMS = ["fp8_e4m3", "int8"]


def pruned(width=16):
    module = TinyModule("sgd", width)
    with torch.no_grad():
        for layer in (module.model[0], module.model[2]):
            layer.weight *= mask_24(layer.weight)
    return module


def keep(**more):
    return Prox24(**{"strategy": "keep", "verbose": False, **more})


def post_step(start=2, freeze=4):
    return Prox24(start, freeze, strategy="post_step", targets=["model.0", "model.2"], verbose=False)


def rounding(*arguments, **more):
    return RoundWeights(*arguments, **{"verbose": False, **more})


def fit(module, *callbacks, steps=3, ckpt_path=None, **more):
    trainer = quiet_trainer(**{"max_steps": steps, "max_epochs": -1, "callbacks": list(callbacks), **more})
    trainer.fit(module, tiny_loader(), ckpt_path=ckpt_path)
    return trainer


def is_rounded(module):
    return "forward" in vars(module.model[0])


class Probe(Callback):
    """Notes before each training batch, and when others convert, whether the first layer is rounded."""

    def __init__(self):
        self.found, self.at_end = [], None

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.found.append(is_rounded(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.at_end = is_rounded(pl_module)


def expanded(rows):
    return expand_rows(rows.values, rows.scales, torch.float32)


def rounded_linear(layer, inputs, form, also_inputs=True):
    weight, tokens = layer.weight.bfloat16(), inputs.bfloat16()
    weight = layer.weight + (expanded(round_rows(weight, form)) - layer.weight).detach()
    if also_inputs:
        inputs = inputs + (expanded(round_tokens(tokens, form)) - inputs).detach()
    return F.linear(inputs, weight, layer.bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", [True, False])
def test_the_run_follows_the_written_out_loop(form, inputs):
    module = pruned()
    by_hand = copy.deepcopy(module)
    first, _, second, _, last = by_hand.model
    masks = [layer.weight != 0 for layer in (first, second)]
    optimizer = by_hand.configure_optimizers()
    for x, y in list(tiny_loader())[:3]:
        optimizer.zero_grad()
        hidden = rounded_linear(first, x, form, inputs).tanh()
        hidden = rounded_linear(second, hidden, form, inputs).tanh()
        F.mse_loss(last(hidden), y).backward()
        for layer, mask in zip((first, second), masks, strict=True):
            layer.weight.grad *= mask
        optimizer.step()
    fit(module, keep(), rounding(form, inputs=inputs))
    for (name, found), wanted in zip(module.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")
    assert is_24(module.model[0].weight)
    assert not is_rounded(module)


@pytest.mark.parametrize(
    "start, first",
    [(0, 4), (6, 6), (0.75, 6)],
    ids=["from the freeze on", "step", "fraction"],
)
@pytest.mark.parametrize("before", [True, False], ids=["before Prox24", "behind Prox24"])
def test_rounding_begins_with_the_freeze_or_later(start, first, before):
    probe = Probe()
    pair = [rounding(start=start), post_step()]
    fit(TinyModule(), *(pair if before else pair[::-1]), probe, steps=8)
    assert probe.found == [False] * first + [True] * (8 - first)
    assert probe.at_end is False


def test_without_prox24_a_model_that_is_24_is_taken_as_it_is_and_its_zeros_are_watched():
    probe = Probe()
    with pytest.warns(UserWarning, match="nothing enforces the masks"):
        fit(pruned(), rounding(start=1), probe)
    assert probe.found == [False, True, True]


class Validated(TinyModule):
    def __init__(self):
        super().__init__()
        self.rounded = []

    def validation_step(self, batch, batch_idx):
        self.rounded.append(is_rounded(self))
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def val_dataloader(self):
        return tiny_loader(1)


def test_validation_within_the_fit_is_rounded_and_after_it_is_not(caplog):
    module = Validated()
    trainer = quiet_trainer(
        max_steps=6,
        max_epochs=-1,
        callbacks=[rounding(start=4, verbose=True), post_step()],
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(module, tiny_loader())
    assert module.rounded == [False] * 3 + [True] * 3
    assert "2 layers with weights and inputs rounded to fp8_e4m3 from now on, in validation too" in caplog.text
    assert "2 layers trained for fp8_e4m3, which changes their weights by 2." in caplog.text
    trainer.validate(module, verbose=False)
    assert not module.rounded[-1]


def test_best_scores_begin_anew_once(tmp_path):
    module = Validated()
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    checkpoint = ModelCheckpoint(tmp_path, monitor="val", save_top_k=-1, filename="{step}")
    stopping = EarlyStopping("val", patience=100)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, post_step(), rounding("int8", 6), checkpoint, stopping, steps=9, **options)
    said = [str(warning.message) for warning in said if "begins anew" in str(warning.message)]
    assert said[0].startswith("the model is 2:4 from this step on")
    assert said[1:] == [
        "the forward is rounded to int8 from this step on: the best score of EarlyStopping('val'), "
        "ModelCheckpoint('val') was of the one without and begins anew"
    ]
    saved = torch.load(tmp_path / "step=7.ckpt", weights_only=False)
    assert set(saved["state_dict"]) == set(Validated().state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(
            Validated(),
            post_step(),
            rounding("int8", 6),
            checkpoint,
            stopping,
            steps=9,
            **options,
            ckpt_path=tmp_path / "step=7.ckpt",
        )
    assert not [w for w in said if "begins anew" in str(w.message)]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("step", [26, 30])
def test_resume_bit_for_bit(tmp_path, step):
    more = lambda: [rounding("int8", 28)]  # noqa: E731
    expected = everything(*run("activation", tmp_path / "one", more=more()))
    plain = everything(*run("activation", tmp_path / "plain"))
    assert not torch.equal(expected["weight model.0.weight"], plain["weight model.0.weight"])
    found = everything(*run("activation", tmp_path / "two", resume=tmp_path / "one" / f"step={step}.ckpt", more=more()))
    assert_same(expected, found)


def test_a_run_that_fails_leaves_plain_layers():
    class Failing(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    module = Failing()
    module.model.load_state_dict(pruned().model.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, keep(), rounding(), steps=5)
    assert not is_rounded(module)


def test_beside_distillation_the_teacher_is_not_rounded():
    module = pruned()
    distillation, probe = Distillation(0.5, loss="mse", verbose=False), Probe()
    fit(module, distillation, keep(), rounding(), probe)
    assert probe.found == [True] * 3
    assert not any("forward" in vars(layer) for layer in distillation.teacher)


def test_mixed_precision_and_two_fits_of_one_model():
    module, callbacks = pruned(), [keep(), rounding()]
    for _ in range(2):
        fit(module, *callbacks, precision="bf16-mixed")
        assert not is_rounded(module)
        assert module.model[0].weight.dtype == torch.float32
    assert is_24(module.model[2].weight)


def test_the_change_by_rounding_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(pruned(), keep(), rounding("int8", 2), steps=6, logger=logger, log_every_n_steps=2)
    logger.save()
    header, *lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("rounding/weights")
    values = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    assert len(values) == 3
    assert all(0.001 < value < 0.01 for value in values)


class Recovered(LightningModule):
    """A 2:4 layer that gives the wanted outputs already: what is left to train is what the rounding costs."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(32, 16, bias=False)
        weight = torch.randn(16, 32, generator=generator)
        self.model.weight = nn.Parameter(weight * mask_24(weight))
        correlated = torch.randn(256, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
        self.x = correlated + 0.3 * torch.randn(256, 32, generator=generator)
        self.y = self.model(self.x).detach()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.model(self.x), self.y)

    def train_dataloader(self):
        return [0] * 60

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.003)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", [True, False])
def test_a_model_that_saw_the_rounding_is_closer_to_the_unrounded_one(form, inputs):
    errors = []
    for callbacks in ([], [rounding(form, inputs=inputs)]):
        module = Recovered()
        quiet_trainer(max_epochs=1, max_steps=-1, callbacks=[keep(), *callbacks]).fit(module)
        with torch.no_grad():
            errors.append(float(F.mse_loss(rounded_linear(module.model, module.x, form, inputs), module.y)))
    assert errors[1] < (0.9 if inputs else 0.7) * errors[0]


def test_what_cannot_work_is_refused_before_the_first_batch():
    with pytest.raises(MisconfigurationException, match="RoundWeights: no weight of the model is 2:4, and no Prox24"):
        fit(TinyModule(), rounding())
    with pytest.raises(MisconfigurationException, match="RoundWeights: start=5 is step 5 of a run of 3"):
        fit(pruned(), keep(), rounding(start=5))


def test_a_run_that_ends_before_the_rounding_is_named():
    with pytest.warns(UserWarning, match="ended at step 4 before the rounding to fp8_e4m3 began .start=2, and all"):
        fit(TinyModule(), post_step(2, 4), rounding(start=2), steps=4, limit_train_batches=4, max_epochs=1)


def test_a_rehearsal_says_nothing_of_that():
    fit(TinyModule(), post_step(0.5, 1.0), rounding(), fast_dev_run=True)


def test_layers_that_train_unrounded_are_named():
    module = pruned()
    module.training_step = lambda batch, batch_idx: F.mse_loss(
        module.model[4](F.linear(module.model[:2](batch[0]), module.model[2].weight)), batch[1]
    )
    with pytest.warns(UserWarning, match="model.2 trained without rounding to fp8_e4m3: the forward was not called"):
        fit(module, keep(), rounding())


def test_a_config_builds_it():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    text = "callback.class_path=prox24_lightning.RoundWeights"
    found = parser.parse_args([f"--{text}", "--callback.init_args.weights=int8", "--callback.init_args.start=0.5"])
    callback = parser.instantiate_classes(found).callback
    assert isinstance(callback, RoundWeights)
    assert callback.weights == "int8"
