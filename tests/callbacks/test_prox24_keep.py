"""A model that is 2:4 before the run: one setting keeps its zeros, and a warning says where they would be lost."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Distillation, Prox24, SparsityMonitor, is_24, load_masks, mask_24
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.phases import PhasePlan
from prox24_lightning.sparsify.traps import traps

LAYERS = ("model.0.weight", "model.2.weight")


@torch.no_grad()
def pruned(module=None, layers=LAYERS):
    module = module or TinyModule()
    for name in layers:
        weight = module.get_parameter(name)
        weight.mul_(mask_24(weight))
    return module


def zeros(module, layers=LAYERS):
    return {name: module.get_parameter(name) == 0 for name in layers}


def fit(module, *callbacks, steps=6):
    quiet_trainer(max_steps=steps, callbacks=list(callbacks)).fit(module, tiny_loader())
    return module


@contextmanager
def no_warning_of_ours():
    """No warning that names the setting; Lightning warns of other things."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert [str(one.message) for one in found if "keep" in str(one.message) or "freeze=0" in str(one.message)] == []


def keep(**arguments):
    return Prox24(**{"strategy": "keep", "verbose": False, **arguments})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_zeros_are_kept_and_the_rest_trains(optimizer):
    module = pruned(TinyModule(optimizer))
    before, values = zeros(module), copy.deepcopy(module.state_dict())
    callback = keep()
    fit(module, callback)
    assert {name: mask.logical_not().equal(before[name]) for name, mask in callback.masks.items()} == dict.fromkeys(
        LAYERS, True
    )
    assert all(found.equal(before[name]) for name, found in zeros(module).items())
    assert not any(module.get_parameter(name).equal(values[name]) for name in (*LAYERS, "model.4.weight"))
    assert callback.phase == "frozen"
    reasons = {weight.name: weight.reason for weight in callback.selection.skipped}
    assert reasons == {"model.4.weight": "not 2:4 in the model that was given"}


def test_no_value_changes_before_the_first_step():
    module = pruned()
    with torch.no_grad():  # three zeros in a group: any two entries may be kept
        module.get_parameter(LAYERS[0])[0, :4] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    values = copy.deepcopy(module.state_dict())

    class Check(Prox24):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx == 0:
                assert all(value.equal(values[name]) for name, value in pl_module.state_dict().items())

    fit(module, Check(strategy="keep", verbose=False), steps=2)


def test_it_needs_no_known_length():
    trainer = quiet_trainer(max_steps=-1, max_epochs=-1, limit_train_batches=4, callbacks=[keep()])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module := pruned(), tiny_loader())
    assert all(is_24(module.get_parameter(name)) for name in LAYERS)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def run(steps, folder, resume=None):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        trainer = quiet_trainer(max_steps=steps, callbacks=[keep(), checkpoint], enable_checkpointing=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The dirpath has changed")
            trainer.fit(module := pruned(), StatefulLoader(tiny_loader()), ckpt_path=resume)
        return module.state_dict()

    whole = run(6, "whole")
    run(3, "half")
    resumed = run(6, "rest", tmp_path / "half" / "step=3.ckpt")
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_dense_model_is_refused_before_the_first_batch():
    with pytest.raises(MisconfigurationException, match=r"takes the zeros .* model.0.weight and 2 more are not 2:4"):
        fit(TinyModule(), keep())
    with pytest.raises(MisconfigurationException, match="model.4.weight is not 2:4; load the pruned weights before"):
        fit(pruned(), keep(targets=["model.*"]))


@pytest.mark.parametrize("arguments, words", [({"start": 0.1}, "start=0.1 has no effect"), ({"freeze": 5}, "freeze=5")])
def test_steps_have_no_meaning(arguments, words):
    with pytest.raises(ValueError, match=words):
        keep(**arguments)
    keep(start=0, freeze=0)


def test_layers_that_are_exchanged_keep_the_zeros_that_they_bring():
    class Module(TinyModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                layer = torch.nn.Linear(16, 4)
                layer.weight.data.mul_(mask_24(layer.weight))
                self.model[4] = layer
                self.trainer.optimizers[0].add_param_group({"params": list(layer.parameters())})

    module, callback = pruned(Module()), keep()
    with pytest.warns(UserWarning, match="also these weights become 2:4: model.4.weight"):
        fit(module, callback)
    assert set(callback.masks) == {*LAYERS, "model.4.weight"}
    assert is_24(module.get_parameter("model.4.weight"))


# The traps.


def test_new_masks_for_a_model_that_is_2_4_are_named():
    with pytest.warns(UserWarning, match=r"2 of the 3 weights are 2:4 already \(model.0.weight is one\).*'keep'"):
        fit(pruned(), Prox24(2, 4, strategy="post_step", verbose=False))


def test_a_freeze_before_the_first_batch_is_named():
    with pytest.warns(UserWarning, match=r"freeze=0 prunes before the first batch.*start=8, freeze=8"):
        fit(TinyModule(), Prox24(0, 0, verbose=False))


OTHER = {
    "dense_target": 0.2,
    "reconstruction_steps": 3,
    "gradient_weighting": False,
    "calibration": "stream",
    "reorder_inputs": True,
    "budget": 0.1,
    "calibration_batches": 3,
    "token_weighting": 0.5,
    "damping": 0.1,
    "metric": "weight",
    "schedule": "linear",
    "fraction": "linear",
    "refit": "restore",
}
"""A value of each setting that is not the default, in the order of the settings."""
POST_STEP = {"schedule", "fraction", "refit"}
PROGRESSIVE = {*OTHER} - POST_STEP - {"metric"}
STREAMED = {"calibration_batches", "damping"}
IGNORED = [
    ({"strategy": "keep"}, {*OTHER}),
    ({"strategy": "post_step"}, PROGRESSIVE),
    ({"strategy": "post_step", "schedule": "linear"}, {*PROGRESSIVE, "fraction"}),
    ({"strategy": "progressive"}, POST_STEP),
    ({"strategy": "progressive", "reconstruction_steps": 0}, {*POST_STEP, "gradient_weighting"}),
    ({"strategy": "progressive", "calibration": "stream"}, {*POST_STEP, *PROGRESSIVE} - STREAMED),
    ({"strategy": "progressive", "calibration": "magnitude"}, {*POST_STEP, *PROGRESSIVE}),
]
"""What decides, and the settings that nothing reads there."""


@pytest.mark.parametrize(
    "given, name, ignored",
    [(given, name, name in ignored) for given, ignored in IGNORED for name in OTHER if name not in given],
)
def test_every_setting_without_effect_is_named_or_refused(given, name, ignored):
    try:
        found = " ".join(traps(SparsifyConfig(**given, **{name: OTHER[name]}), PhasePlan(2, 4), 8, []))
        found = found.partition(": ")[2]  # behind what decides
    except ValueError as error:
        found = str(error)
    assert (f"{name}={OTHER[name]!r}" in found) == ignored, found


def test_settings_without_effect_are_named_once():
    arguments = {"dense_target": 0.2, "token_weighting": 0.5, "calibration": "stream"}
    words = "dense_target=0.2, token_weighting=0.5; leave it out"
    with pytest.warns(UserWarning, match=f"no effect with strategy='progressive', calibration='stream': {words}"):
        fit(TinyModule(), Prox24(2, 4, verbose=False, **arguments))
    words = "dense_target=0.2, token_weighting=0.5, calibration='stream'; leave it out"
    with pytest.warns(UserWarning, match=f"no effect with strategy='keep': {words}"):
        fit(pruned(), Prox24(strategy="keep", verbose=False, **arguments))


@pytest.mark.parametrize("arguments", [{"calibration": "magnitude"}, {"strategy": "post_step"}])
def test_a_freeze_before_the_first_batch_that_is_meant(arguments):
    with no_warning_of_ours():
        fit(TinyModule(), Prox24(0, 0, verbose=False, **arguments))


@pytest.mark.parametrize(
    "start, freeze, words",
    [
        (0, 1, r"freeze=1 is an int.*freeze=1.0 would be the end"),
        (0.1, 1.0, "freeze=1.0 is the end of the run, step 6"),
    ],
)
def test_one_step_and_the_whole_run_are_told_apart(start, freeze, words):
    with pytest.warns(UserWarning, match=words):
        fit(TinyModule(), Prox24(start, freeze, verbose=False))


def test_the_first_and_the_last_step_may_be_meant():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(TinyModule(), Prox24(1, 1, verbose=False))
        fit(TinyModule(), Prox24(1, 6, verbose=False))
    assert not [one for one in found if "freeze=" in str(one.message)]


def test_weights_of_16_bits_that_do_not_move_are_not_warned_of():
    module = pruned(TinyModule()).bfloat16()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        quiet_trainer(max_steps=2, precision="bf16-true", callbacks=[keep()]).fit(module, tiny_loader())
    assert not [one for one in found if "stored in" in str(one.message)]


def test_a_resumed_run_is_not_warned(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    quiet_trainer(max_steps=4, callbacks=[Prox24(1, 3, verbose=False), checkpoint], enable_checkpointing=True).fit(
        TinyModule(), StatefulLoader(tiny_loader())
    )
    with no_warning_of_ours():
        quiet_trainer(max_steps=6, callbacks=[Prox24(1, 3, verbose=False)]).fit(
            TinyModule(), StatefulLoader(tiny_loader()), ckpt_path=checkpoint.best_model_path
        )


def monitor():
    return SparsityMonitor(1, summary=False, overview=False)


@pytest.mark.parametrize("make", [monitor, lambda: Distillation(0.5, verbose=False)], ids=["monitor", "distillation"])
def test_zeros_that_nothing_keeps_are_named(make):
    with pytest.warns(UserWarning, match=r"model.0.weight and 1 more are no longer 2:4.*Prox24\(strategy='keep'\)"):
        fit(pruned(), make())


def test_zeros_that_are_kept_are_not_named(tmp_path):
    module, callback = pruned(), keep(masks_file=tmp_path / "masks.safetensors")
    with no_warning_of_ours():
        fit(module, callback, monitor())
        trained = TinyModule()
        load_masks(trained, tmp_path / "masks.safetensors", expect="any")
        fit(trained, monitor())
        fit(TinyModule(), monitor())


def test_the_monitor_shows_a_frozen_run_from_the_first_step():
    watch = monitor()
    fit(pruned(), keep(), watch)
    history = watch.histories["prox24"]
    assert history.phases == [(0, "frozen")]
    assert set(history.groups_24) == {1.0}
