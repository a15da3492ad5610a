"""A teacher from the checkpoint of a dense run: its weights, resume, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilled_runs import TinyClassifier, distillation, fit
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import quiet_trainer
from torch import nn

from prox24_lightning import Prox24
from prox24_lightning.finetune import weights_checksum


def seeded(width=16):
    torch.manual_seed(0)
    return TinyClassifier(width=width)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """The module after a dense run, and its checkpoint."""
    path = tmp_path_factory.mktemp("dense") / "last.ckpt"
    module = seeded()
    fit(module, steps=8).save_checkpoint(path)
    return module, path


@pytest.mark.parametrize("kind", [str, Path])
def test_the_run_is_that_with_the_module_itself_as_teacher(dense_run, kind):
    trained, path = dense_run
    one, two = seeded(), seeded()
    fit(one, distillation(1.0, teacher=trained.model))
    callback = distillation(1.0, teacher=kind(path))
    fit(two, callback)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert weights_checksum(callback.teacher) == weights_checksum(trained.model)


def test_the_student_begins_as_it_was_constructed(dense_run):
    class Begin(Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = state_of(pl_module)

    begin = Begin()
    fit(seeded(), distillation(teacher=dense_run[1]), begin)
    assert all(torch.equal(value, begin.state[name]) for name, value in seeded().state_dict().items())


def test_a_compiled_module_takes_a_plain_checkpoint_and_the_reverse(dense_run, tmp_path):
    trained, path = dense_run
    compiled = seeded()
    compiled.model = torch.compile(compiled.model, backend="eager")
    callback = distillation(teacher=path)
    callback.setup(quiet_trainer(callbacks=[callback]), compiled, "fit")
    assert weights_checksum(callback.teacher) == weights_checksum(trained.model)
    compiled.load_state_dict({f"model._orig_mod.{name}": value for name, value in trained.model.state_dict().items()})
    torch.save({"state_dict": compiled.state_dict()}, tmp_path / "compiled.ckpt")
    callback = distillation(teacher=tmp_path / "compiled.ckpt")
    fit(seeded(), callback)
    assert weights_checksum(callback.teacher) == weights_checksum(trained.model)


def test_a_second_fit_keeps_the_teacher_and_another_model_reads_it_again(dense_run, tmp_path):
    module, path = seeded(), tmp_path / "last.ckpt"
    path.write_bytes(dense_run[1].read_bytes())
    callback = distillation(teacher=path)
    fit(module, callback)
    path.unlink()
    fit(module, callback)
    assert weights_checksum(callback.teacher) == weights_checksum(dense_run[0].model)
    with pytest.raises(MisconfigurationException, match="there is no file"):
        fit(seeded(), callback)


def test_a_resumed_run_takes_the_same_file_and_no_other(dense_run, tmp_path):
    _, path = dense_run
    fit(seeded(), distillation(teacher=path), batches=3).save_checkpoint(tmp_path / "run.ckpt")
    again = {"steps": 6, "batches": 3, "ckpt_path": tmp_path / "run.ckpt"}
    assert fit(seeded(), distillation(teacher=path), **again).global_step == 6
    fit(seeded(), steps=2).save_checkpoint(tmp_path / "other.ckpt")
    words = (
        r"written with another teacher .* name the file that the run began with, as it was, instead of teacher='.*other"
    )
    with pytest.raises(MisconfigurationException, match=words):
        fit(seeded(), distillation(teacher=tmp_path / "other.ckpt"), **again)


def test_a_pruned_teacher_warns(tmp_path):
    fit(seeded(), Prox24(1, 2, strategy="post_step", verbose=False), steps=4).save_checkpoint(tmp_path / "pruned.ckpt")
    with pytest.warns(UserWarning, match=r"pruned\.ckpt is pruned: 3 of its weights are 2:4, the first 0\.weight"):
        fit(seeded(), distillation(teacher=tmp_path / "pruned.ckpt"))


class Wider(TinyClassifier):
    def __init__(self):
        super().__init__(width=24)


class More(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.model.append(nn.Linear(4, 4))


class Renamed(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.net = self.model
        del self.model


class Late(TinyClassifier):
    def configure_model(self):
        pass


@pytest.mark.parametrize(
    "module, words",
    [
        (
            Wider,
            r"does not fit 'model', size mismatch for 4\.weight: .*\[4, 16\].*\[4, 24\]\): name a checkpoint of the",
        ),
        (
            More,
            r"does not fit 'model', it lacks 2 tensors \(5\.weight, 5\.bias\): name a checkpoint of the same",
        ),
        (
            Renamed,
            r"holds no weight of 'net' but 6 tensors \(model\.0\.weight, model\.0\.bias, \.\.\.\): name a checkpoint",
        ),
    ],
)
def test_a_checkpoint_of_another_module_is_refused_before_the_first_step(dense_run, module, words):
    module, steps = module(), []
    module.on_before_zero_grad = lambda optimizer: steps.append(1)
    with pytest.raises(MisconfigurationException, match=words):
        fit(module, distillation(teacher=dense_run[1]))
    assert steps == []


def test_more_than_the_module_has_is_refused(tmp_path):
    fit(More(), steps=1).save_checkpoint(tmp_path / "more.ckpt")
    with pytest.raises(MisconfigurationException, match=r"it holds 2 tensors \(5\.weight, 5\.bias\) besides: name a"):
        fit(seeded(), distillation(teacher=tmp_path / "more.ckpt"))


def with_object(path, content):
    path.write_bytes(content)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"model": nn.Identity()}}, path)


def sharded(path, content):
    path.mkdir()
    (path / ".metadata").touch()


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path, content: None, r"there is no file /.*x\.ckpt: train the teacher first, or correct the path"),
        (lambda path, content: path.mkdir(), r"x\.ckpt is a folder: name the checkpoint in it"),
        (
            sharded,
            r"x\.ckpt is a sharded checkpoint: run python -m .*consolidate_checkpoint .*name .*x\.ckpt\.consolid",
        ),
        (with_object, r"x\.ckpt holds more than plain data \(torch\.nn\.modules\.linear\.Identity\), and loading that"),
        (lambda path, content: path.write_bytes(content[:1000]), r"x\.ckpt is damaged or no checkpoint"),
        (lambda path, content: path.write_text("no checkpoint"), r"x\.ckpt is damaged or "),
    ],
)
def test_a_path_that_gives_no_teacher_is_refused(dense_run, tmp_path, write, words):
    write(tmp_path / "x.ckpt", dense_run[1].read_bytes())
    with pytest.raises(MisconfigurationException, match=rf"Distillation\(teacher=\.\.\.\): .*{words}") as error:
        fit(Late(), distillation(teacher=tmp_path / "x.ckpt"))
    assert "configure_model" not in str(error.value)


@pytest.mark.parametrize("given", ["last.ckpt", "runs/epoch=1-step=20.ckpt", Path("last.ckpt")])
def test_yaml_takes_a_path(given):
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    entry = {"class_path": "prox24_lightning.Distillation", "init_args": {"teacher": given}}
    parsed = parser.parse_object({"callbacks": [entry]})
    assert f"teacher: {given}" in parser.dump(parsed)
    [callback] = parser.instantiate_classes(parsed).callbacks
    with pytest.raises(MisconfigurationException, match=rf"there is no file /.*{given}:"):
        fit(seeded(), callback)
