"""Invariant 4: N steps in one go, and N steps with a crash in between, are the same bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from new_processes import in_new_process
from resumed_runs import FREEZE, SETTINGS, START, STEPS, assert_same, everything, run, run_and_save
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, load_masks

pytestmark = [
    # Each run writes its checkpoints into a folder of its own.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module", params=list(SETTINGS))
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, everything(*run(request.param, folder))


@pytest.fixture(scope="module")
def frozen_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weight")
    run("weight", folder)
    return folder / "step=29.ckpt"


@pytest.mark.parametrize("step", [3, 8, 13, 23, 24, 29])
def test_resume_in_one_process(unbroken, tmp_path, step):
    setting, folder, expected = unbroken
    resumed = run(setting, tmp_path, resume=folder / f"step={step}.ckpt")
    assert_same(expected, everything(*resumed))


def test_resume_in_a_new_process(unbroken, tmp_path):
    setting, folder, expected = unbroken
    if setting not in ("progressive", "restore"):
        pytest.skip("the settings with more state are enough here")
    for step in (13, 29):  # while sparsifying, and frozen
        target = tmp_path / f"{step}.pt"
        in_new_process(run_and_save, setting, tmp_path, folder / f"step={step}.ckpt", target)
        assert_same(expected, torch.load(target, weights_only=True))


def test_the_state_is_read_with_weights_only(frozen_checkpoint):
    state = torch.load(frozen_checkpoint, weights_only=True)["callbacks"]
    [prox] = [value for key, value in state.items() if key.startswith("Prox24")]
    assert (prox["phase"], prox["step"]) == ("frozen", 29)


def test_a_checkpoint_written_without_the_callback_loads_with_a_warning(tmp_path):
    trainer = quiet_trainer(max_steps=8, max_epochs=-1)
    trainer.fit(TinyModule(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    prox = Prox24(4, 12, strategy="post_step", verbose=False)
    with pytest.warns(UserWarning, match=r"holds no state of Prox24 .*going on from step 8 as sparsify"):
        quiet_trainer(max_steps=16, max_epochs=-1, callbacks=[prox]).fit(
            TinyModule(), tiny_loader(), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert (prox.phase, prox.step) == ("frozen", 16)


@pytest.mark.parametrize(
    "targets, words",
    [
        (["model.0"], r"masks belong to other weights: only in the checkpoint: \['model.2.weight'\]"),
        (["model.*"], r"only in the model: \['model.4.weight'\]"),
    ],
)
def test_masks_of_other_weights_are_refused(frozen_checkpoint, targets, words):
    prox = Prox24(START, FREEZE, strategy="post_step", metric="weight", verbose=False, targets=targets)
    with pytest.raises(MisconfigurationException, match=words):
        quiet_trainer(max_steps=STEPS, max_epochs=-1, callbacks=[prox]).fit(
            TinyModule(), StatefulLoader(tiny_loader(STEPS)), ckpt_path=frozen_checkpoint
        )


def test_a_checkpoint_of_the_last_step_still_gives_the_masks_file(tmp_path):
    run("weight", tmp_path)
    prox = Prox24(
        START, FREEZE, strategy="post_step", metric="weight", verbose=False, masks_file=tmp_path / "m.safetensors"
    )
    prox.config = replace(prox.config, targets=["model.0", "model.2"])
    module = TinyModule()
    quiet_trainer(max_steps=STEPS, max_epochs=-1, callbacks=[prox]).fit(
        module, StatefulLoader(tiny_loader(STEPS)), ckpt_path=tmp_path / f"step={STEPS}.ckpt"
    )
    assert (prox.phase, prox.step) == ("frozen", STEPS)
    assert load_masks(module, tmp_path / "m.safetensors")
