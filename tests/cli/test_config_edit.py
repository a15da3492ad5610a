"""How a config becomes each variant's config."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from prox24_lightning.cli.compare.config_edit import (
    callback_entries,
    separate_outputs,
    with_one_shot_magnitude,
    without_conversion,
    without_pruning,
)

PROX24 = "prox24_lightning.callbacks.prox24.Prox24"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def entry(path: str, **arguments) -> Namespace:
    return Namespace(class_path=path, init_args=Namespace(**arguments))


def config(callbacks=None, logger=None) -> Namespace:
    return Namespace(trainer=Namespace(callbacks=callbacks, logger=logger, default_root_dir=None))


def paths(edited: Namespace) -> list[str]:
    return [entry.class_path for entry in callback_entries(edited)]


@pytest.mark.parametrize("callbacks", [None, [], entry(CHECKPOINT), [entry(CHECKPOINT)]])
def test_callbacks_are_always_read_as_a_list(callbacks):
    expected = [] if not callbacks else [CHECKPOINT]
    assert paths(config(callbacks)) == expected


def test_dense_drops_every_prox24_and_keeps_the_rest():
    monitor = "prox24_lightning.SparsityMonitor"
    rounding = entry("prox24_lightning.RoundWeights")
    edited = config([entry(CHECKPOINT), entry(PROX24), entry("prox24_lightning.Prox24"), rounding, entry(monitor)])
    without_pruning(edited)
    assert paths(edited) == [CHECKPOINT, monitor]


def test_asp_prunes_the_same_weights_in_one_shot_by_magnitude():
    given = entry(PROX24, start=0.1, freeze=0.6, metric="activation", refit="restore", targets=["*.up"], name="a")
    edited = config([given, entry(CHECKPOINT)])
    with_one_shot_magnitude(edited, at=0.4)
    assert paths(edited) == [PROX24, CHECKPOINT]
    assert vars(edited.trainer.callbacks[0].init_args) == {
        "targets": ["*.up"],
        "name": "a",
        "start": 0.4,
        "freeze": 0.4,
        "strategy": "post_step",
        "metric": "weight",
    }


def test_every_prox24_of_the_config_becomes_one_shot():
    edited = config([entry(PROX24, name="a"), entry(PROX24, name="b")])
    with_one_shot_magnitude(edited, at=0.5)
    assert [entry.init_args.name for entry in edited.trainer.callbacks] == ["a", "b"]
    assert {entry.init_args.freeze for entry in edited.trainer.callbacks} == {0.5}


def test_conversion_is_left_out():
    edited = config([entry(PROX24), entry("prox24_lightning.ConvertAndBenchmark")])
    without_conversion(edited)
    assert paths(edited) == [PROX24]


@pytest.mark.parametrize("logger", [None, True])
def test_a_run_without_a_chosen_logger_gets_tensorboard_of_its_own(logger):
    edited = config(logger=logger)
    separate_outputs(edited, Path("out"), "asp", 3)
    assert edited.trainer.logger.class_path.endswith("TensorBoardLogger")
    assert vars(edited.trainer.logger.init_args) == {"save_dir": "out", "name": "asp", "version": "seed3"}


def test_loggers_are_redirected_and_keep_their_other_settings():
    edited = config(logger=[entry(TENSORBOARD, save_dir="runs", log_graph=True)])
    separate_outputs(edited, Path("out"), "dense", 0)
    expected = {"save_dir": "out", "log_graph": True, "name": "dense", "version": "seed0"}
    assert vars(edited.trainer.logger[0].init_args) == expected


def test_no_logger_stays_none():
    edited = config(logger=False)
    separate_outputs(edited, Path("out"), "dense", 0)
    assert edited.trainer.logger is False


def test_checkpoints_of_two_runs_do_not_meet():
    edited = config([entry(CHECKPOINT, dirpath="here"), entry(CHECKPOINT, dirpath=None)])
    separate_outputs(edited, Path("out"), "prox24", 1)
    assert [entry.init_args.dirpath for entry in edited.trainer.callbacks] == ["out/prox24/seed1/checkpoints", None]
    assert edited.trainer.default_root_dir == "out/prox24/seed1"


def test_masks_of_two_runs_do_not_meet_nor_replace_those_of_a_fit():
    edited = config([entry(PROX24, masks_file="runs/m.safetensors"), entry(PROX24, name="b", masks_file=None)])
    separate_outputs(edited, Path("out"), "prox24", 1)
    assert [entry.init_args.masks_file for entry in edited.trainer.callbacks] == [
        "out/prox24/seed1/m.safetensors",
        None,
    ]
