"""Averages that the module or a callback of one's own keeps become 2:4 with the weights; teachers stay dense."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prox24_lightning import Prox24, is_24

LAYERS = ("0", "2")


def towards(average, values):
    with torch.no_grad():
        for mine, theirs in zip(average, values, strict=True):
            mine.lerp_(theirs.detach(), 0.1)


class Averaging(TinyModule):
    """Keeps an average in one of the ways that people do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "submodule":
            self.ema = copy.deepcopy(self.model).requires_grad_(False)
        elif kind == "submodule in the optimizer":
            self.ema = copy.deepcopy(self.model)
        elif kind == "AveragedModel":
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        elif kind == "buffers without dots":
            for name, parameter in self.model.named_parameters():
                self.register_buffer(f"model.{name}".replace(".", ""), parameter.detach().clone())

    def on_train_start(self):
        values = [parameter.detach().clone() for parameter in self.model.parameters()]
        if self.kind == "dict":
            self.shadow = dict(zip([name for name, _ in self.model.named_parameters()], values, strict=True))
        elif self.kind == "list":
            self.shadow = values
        elif self.kind == "object":
            self.shadow = type("Average", (), {})()
            self.shadow.values = values
        elif self.kind == "hidden module":
            self.__dict__["ema"] = copy.deepcopy(self.model).requires_grad_(False)

    def on_train_batch_end(self, *args):
        if self.kind == "AveragedModel":
            self.ema.update_parameters(self.model)
        else:
            towards(self.average(), self.model.parameters())

    def average(self):
        """The averages of all parameters, in the order of the model."""
        if self.kind == "dict":
            return list(self.shadow.values())
        if self.kind == "list":
            return self.shadow
        if self.kind == "object":
            return self.shadow.values
        if self.kind == "buffers without dots":
            return [getattr(self, f"model.{name}".replace(".", "")) for name, _ in self.model.named_parameters()]
        return list(self.ema.parameters())


KINDS = [
    "submodule",
    "AveragedModel",
    "buffers without dots",
    "dict",
    "list",
    "object",
    "hidden module",
]


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_the_module_becomes_sparse(kind, strategy):
    prox, module = Prox24(4, 12, strategy=strategy, verbose=False, targets=["model.0", "model.2"]), Averaging(kind)
    quiet_trainer(max_steps=20, callbacks=[prox]).fit(module, tiny_loader(20))
    assert prox.phase == "frozen"
    averages = dict(zip([name for name, _ in module.model.named_parameters()], module.average(), strict=True))
    assert [is_24(averages[f"{layer}.weight"]) for layer in LAYERS] == [True, True]


def test_an_average_that_an_optimizer_holds_is_named():
    """It is pruned like any other weight then, and the averaging writes to what is pruned."""
    prox, module = Prox24(4, 12, strategy="post_step", verbose=False), Averaging("submodule in the optimizer")
    with pytest.warns(UserWarning, match="ema.*weight is frozen, yet something has written to its pruned entries"):
        quiet_trainer(max_steps=20, callbacks=[prox]).fit(module, tiny_loader(20))


def test_an_average_that_a_callback_keeps_becomes_sparse():
    class Average(Callback):
        def on_train_start(self, trainer, pl_module):
            self.ema = copy.deepcopy(pl_module.model)

        def on_train_batch_end(self, trainer, pl_module, *args):
            towards(self.ema.parameters(), pl_module.model.parameters())

    average, module = Average(), TinyModule()
    quiet_trainer(max_steps=20, callbacks=[Prox24(4, 12, verbose=False), average]).fit(module, tiny_loader(20))
    assert is_24(average.ema[2].weight)
    assert is_24(average.ema[0].weight)


def test_what_does_not_move_is_left_alone():
    class WithTeacher(TinyModule):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    module = WithTeacher()
    dense = copy.deepcopy(module.teacher.state_dict())
    quiet_trainer(max_steps=20, callbacks=[Prox24(4, 12, verbose=False)]).fit(module, tiny_loader(20))
    assert is_24(module.model[2].weight)
    assert all(torch.equal(value, dense[name]) for name, value in module.teacher.state_dict().items())


def test_saved_averages_are_sparse(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 15:
                trainer.save_checkpoint(tmp_path / "15.ckpt")

    module = Averaging("submodule")
    quiet_trainer(max_steps=15, callbacks=[Prox24(4, 12, verbose=False), Save()]).fit(module, tiny_loader(20))
    state = torch.load(tmp_path / "15.ckpt", weights_only=True)["state_dict"]
    assert is_24(state["ema.2.weight"])


def test_two_layers_that_a_copy_may_belong_to_are_not_confused():
    class Towers(TinyModule):
        def __init__(self):
            super().__init__()
            self.other = copy.deepcopy(self.model)
            self.ema = nn.ModuleDict({"model": copy.deepcopy(self.model), "other": copy.deepcopy(self.other)})
            self.ema.requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.other(batch[0]).square().mean()

        def on_train_batch_end(self, *args):
            towards(self.ema["model"].parameters(), self.model.parameters())
            towards(self.ema["other"].parameters(), self.other.parameters())

    prox, module = Prox24(4, 12, strategy="post_step", verbose=False), Towers()
    quiet_trainer(max_steps=20, callbacks=[prox]).fit(module, tiny_loader(20))
    for name in ("model", "other"):
        assert torch.equal(module.ema[name][2].weight != 0, prox.masks[f"{name}.2.weight"])


@pytest.mark.parametrize("wrapped", ["a layer", "the model"])
def test_averages_of_compiled_layers_get_their_masks(wrapped):
    module, prox = TinyModule(), Prox24(4, 8, verbose=False)
    if wrapped == "a layer":
        module.model[2] = torch.compile(module.model[2], backend="eager")
    else:
        module.model = torch.compile(module.model, backend="eager")
    callbacks = [prox, EMAWeightAveraging(decay=0.9)]
    quiet_trainer(max_steps=12, max_epochs=-1, callbacks=callbacks).fit(module, tiny_loader(4))
    assert len(prox.weights) == 3
    assert all(is_24(weight.parameter) for weight in prox.weights), "the averages are in the model now"
