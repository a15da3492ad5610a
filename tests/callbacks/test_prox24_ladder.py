"""What counts as training, and what a run does to copies, files and exports of the model made in between."""

from __future__ import annotations

import copy
import enum
import io
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prox24_lightning import Prox24, is_24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(module, *callbacks, validation=None, trainer=None, **arguments):
    seed_everything(0, verbose=False)
    prox = Prox24(4, 18, verbose=False, **arguments)
    settings = {"max_steps": 24, "max_epochs": -1, "callbacks": [prox, *callbacks], "val_check_interval": 2}
    quiet_trainer(**settings, **(trainer or {})).fit(module, tiny_loader(), validation)
    assert prox.phase == "frozen"
    return prox


def made(kind=TinyModule):
    seed_everything(1, verbose=False)
    return kind()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Differentiating(TinyModule):
    """Its validation needs gradients, as for forces."""

    @torch.enable_grad()
    def validation_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        torch.autograd.grad(self(x).sum(), x)


@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
@pytest.mark.parametrize("calibration", ["auto", "stream"])
def test_validation_that_differentiates_is_no_training(calibration):
    alone, validated = made(), made(Differentiating)
    fit(alone, calibration=calibration)
    odd = DataLoader(TensorDataset(torch.full((8, 8), 7.0), torch.zeros(8, 4)), batch_size=4)
    fit(validated, validation=odd, trainer={"inference_mode": False}, calibration=calibration)
    assert same(alone, validated)


class Copying(TinyModule):
    """Calls a deep copy of the model, made in the middle of the run, on batches of its own."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            self.__dict__["other"] = copy.deepcopy(self.model)
        if self.global_step > 3:
            self.other(torch.full((4, 8), 7.0))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("arguments", [{}, {"calibration": "stream"}, {"strategy": "post_step"}])
def test_calls_of_a_deep_copy_do_not_count(arguments):
    alone, copying = made(), made(Copying)
    fit(alone, **arguments)
    fit(copying, **arguments)
    assert same(alone, copying)


class Exports(Callback):
    """After every step, pickles the model, scripts and exports it; before every step, pickles it."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.pickled(module.model)

    def on_train_batch_end(self, trainer, module, *args):
        x = torch.zeros(1, 8)
        expected = module.model(x)
        assert torch.equal(torch.jit.script(module.model)(x), expected)
        assert torch.equal(self.pickled(module.model)(x), expected)
        if trainer.global_step in (6, 7):
            torch.export.export(module.model, (x,))

    def pickled(self, model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("arguments", [{}, {"calibration": "stream"}])
def test_the_model_can_be_pickled_scripted_and_exported_in_mid_run(arguments):
    alone, exported = made(), made()
    fit(alone, **arguments)
    fit(exported, Exports(), **arguments)
    assert same(alone, exported)


Named = namedtuple("Named", "x")


@dataclass
class Data:
    x: torch.Tensor
    factor: float = 1.0


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, more=None):
        factor = 1.0
        if isinstance(more, Mode):
            factor = float(more.value)
        if isinstance(more, (np.generic, np.ndarray)):
            factor = float(more.sum())
        if isinstance(more, torch.Generator):
            factor = torch.rand((), generator=more)
        x = x["x"] if hasattr(x, "keys") else getattr(x, "x", x)
        return self.third(self.second(self.first(x * factor).tanh()).tanh())


class Batched(TinyModule):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.model, self.wrap = Takes(), wrap

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.model(*self.wrap(batch[0], self.global_step)), batch[1])


class SetsScale(TinyModule):
    """Its model uses what the training step sets on it, so that it cannot be called again."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Scaled()

    def training_step(self, batch, batch_idx):
        self.model.scale = 1.0 + self.global_step % 3
        return super().training_step(batch, batch_idx)


class Scaled(Takes):
    def forward(self, x):
        return super().forward(x * self.scale)


def encoded(x, step):
    return (pytest.importorskip("transformers").BatchEncoding({"x": x}),)


ARGUMENTS = {
    "tensor": lambda x, step: (x,),
    "named tuple": lambda x, step: (Named(x),),
    "ordered dictionary": lambda x, step: (OrderedDict(x=x),),
    "dataclass": lambda x, step: (Data(x, float(step)),),
    "batch encoding": encoded,
    "size": lambda x, step: (x, x.shape),
    "numpy scalar": lambda x, step: (x, np.float64(1 + step % 3)),
    "numpy array": lambda x, step: (x, np.full(2, 1 + step % 3)),
    "enum": lambda x, step: (x, list(Mode)[step % 2]),
    "random generator": lambda x, step: (x, torch.Generator().manual_seed(step)),
}


def loader():
    return StatefulLoader(tiny_loader(28))


def resumed_ends_alike(make, tmp_path, at, **arguments):
    def run(resume=None, folder=tmp_path):
        seed_everything(0, verbose=False)
        module, prox = make(), Prox24(6, 22, verbose=False, **arguments)
        save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(max_steps=24, max_epochs=-1, callbacks=[prox, save], enable_checkpointing=True)
        trainer.fit(module, loader(), ckpt_path=resume, weights_only=None if resume is None else True)
        assert prox.phase == "frozen"
        return module

    whole = run()
    return same(whole, run(tmp_path / f"step={at}.ckpt", tmp_path / "resumed"))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_runs_resume_bit_for_bit_whatever_the_model_is_called_with(kind, tmp_path):
    assert resumed_ends_alike(lambda: Batched(ARGUMENTS[kind]), tmp_path, at=14)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("at", [1, 5, 12, 14, 19])
def test_streamed_runs_resume_bit_for_bit(at, tmp_path):
    assert resumed_ends_alike(SetsScale, tmp_path, at=at)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_runs_by_magnitude_resume_bit_for_bit(tmp_path):
    assert resumed_ends_alike(TinyModule, tmp_path, at=12, calibration="magnitude")


@pytest.mark.parametrize("calibration", ["stream", "magnitude"])
def test_calibration_can_be_chosen(calibration):
    module = made()
    prox = fit(module, calibration=calibration)
    assert all(is_24(weight.parameter) for weight in prox.weights)


def test_unknown_calibration_is_refused():
    with pytest.raises(ValueError, match="calibration='rerun' is unknown; use one of auto, stream, magnitude"):
        Prox24(calibration="rerun")
