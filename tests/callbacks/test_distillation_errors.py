"""What distillation refuses, and what it warns of: every message."""

from __future__ import annotations

import pytest
import torch
from distilled_runs import Residual, ResidualClassifier, TinyClassifier, distillation, fit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Distillation


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"share": 0}, "share=0 must be above 0 and at most 1"),
        ({"share": 1.5}, "share=1.5 must be above 0 and at most 1"),
        ({"share": float("nan")}, "share=nan must be above 0"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"temperature": -2.0}, "temperature=-2.0 must be above 0"),
        ({"features": -0.1}, "features=-0.1 must not be negative"),
        ({"loss": "l2"}, "loss='l2' is unknown; use one of kl, mse"),
        ({"loss": "mse", "temperature": 2.0}, "temperature=2.0 belongs to loss='kl'"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Distillation(**arguments)


class Manual(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoChildren(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)


class Late(TinyClassifier):
    def __init__(self):
        super().__init__()
        del self.model

    def configure_model(self):
        self.model = nn.Linear(8, 4)


class NeverCalled(TinyClassifier):
    def training_step(self, batch, batch_idx):
        return sum(value.sum() for value in self.parameters())


class WithoutGradients(NeverCalled):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.model(batch[0])
        return super().training_step(batch, batch_idx)


class NoLogits(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.model = ReturnsText()

    def training_step(self, batch, batch_idx):
        self.model(batch[0])
        return self.model.layer(batch[0]).sum()


class ReturnsText(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return {"answer": "four"}


class Frozen(Residual):
    def __init__(self):
        super().__init__()
        self.blocks[0].requires_grad_(False)


class SkipsABlock(Residual):
    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](x)))


class GivesText(Residual):
    class Block(nn.Linear):
        def forward(self, x):
            return {"x": super().forward(x)}

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(8, 8)])

    def forward(self, x):
        return self.head(self.blocks[0](x)["x"])


class Scalar(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().mean()


def compiled():
    return torch.compile(Residual(), backend="eager")


def compiled_in_place():
    model = Residual()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "module, arguments, words",
    [
        (Manual, {}, "Manual sets automatic_optimization=False"),
        (TwoChildren, {}, r"TwoChildren has 2 children that train \('model', 'head'\): name the one"),
        (TinyClassifier, {"module": "net"}, r"module='net' is not in TinyClassifier; .* train: 'model'"),
        (Late, {}, r"Late has 0 children that train \(none\).*the teacher is copied before configure_model"),
        (NeverCalled, {}, "the training step never called 'model'"),
        (WithoutGradients, {}, "the training step called 'model' without gradients only"),
        (NoLogits, {}, "model: no logits in an output of type dict with answer"),
        (TinyClassifier, {"teacher": nn.Linear(8, 5)}, r"model: the student's logits have shape \(4, 4\)"),
        (TinyClassifier, {"teacher": nn.Linear(8, 5), "loss": "mse"}, r"model: the student's outputs have shape"),
        (TinyClassifier, {"teacher": nn.Linear(8, 4, device="meta")}, "weight has no values yet"),
        (Scalar, {}, r"model: logits of shape \(4, 1\) hold no distribution"),
        (TinyClassifier, {"features": 1}, "Sequential has no ModuleList of them"),
        (ResidualClassifier, {"features": 1, "teacher": nn.Linear(8, 4)}, "Linear has no ModuleList of them"),
        (ResidualClassifier, {"features": 1, "teacher": Residual(2)}, "'model' has 3 and the teacher 2"),
        (lambda: ResidualClassifier(compiled()), {"features": 1}, "'model', which is compiled as a whole"),
        (lambda: ResidualClassifier(compiled_in_place()), {"features": 1}, "'model', which is compiled as a whole"),
        (lambda: ResidualClassifier(Frozen()), {"features": 1}, r"hidden state of block blocks\.0 carries no gradient"),
        (lambda: ResidualClassifier(SkipsABlock()), {"features": 1}, r"block blocks\.2 was not called"),
        (lambda: ResidualClassifier(GivesText()), {"features": 1}, r"block blocks\.0 returns dict"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_first_step(module, arguments, words):
    module, steps = module(), []
    module.on_before_zero_grad = lambda optimizer: steps.append(1)
    with pytest.raises(MisconfigurationException, match=words):
        fit(module, distillation(**arguments))
    assert steps == []
    assert "training_step" not in vars(module)


def test_hidden_states_of_another_width_are_refused():
    class Wide(Residual):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16)) for _ in range(3))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            for block in self.blocks:
                block(x)
            return self.head(x)

    with pytest.raises(MisconfigurationException, match=r"block blocks\.0: the student's hidden states have shape"):
        fit(ResidualClassifier(), distillation(features=1, teacher=Wide()))


def test_two_of_them_are_refused():
    with pytest.raises(MisconfigurationException, match="the trainer has 2 Distillation callbacks"):
        fit(TinyClassifier(), distillation(module="model"), _Another(0.5, verbose=False))


class _Another(Distillation):
    """Another state key, so that Lightning itself takes both."""


def test_another_teacher_than_the_checkpoints_is_refused(tmp_path):
    fit(TinyClassifier(), distillation()).save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(1)
    with pytest.raises(MisconfigurationException, match=r"written with another teacher \(checksum \w+, now \w+\)"):
        fit(TinyClassifier(), distillation(), steps=6, ckpt_path=tmp_path / "run.ckpt")


class WithTestStep(TinyClassifier):
    def test_step(self, batch, batch_idx):
        pass


def test_what_a_test_has_read_is_of_the_tested_model(tmp_path):
    fit(TinyClassifier(), distillation()).save_checkpoint(tmp_path / "run.ckpt")
    callback, module = distillation(), WithTestStep()
    tester = quiet_trainer(callbacks=[callback])
    tester.test(module, tiny_loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert fit(TinyClassifier(), callback).global_step == 3
    callback = distillation()
    tester = quiet_trainer(callbacks=[callback])
    tester.test(module, tiny_loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    with pytest.raises(MisconfigurationException, match="written with another teacher"):
        fit(module, callback)  # would learn from the trained weights


def test_a_checkpoint_that_was_written_without_the_callback_warns(tmp_path):
    fit(TinyClassifier(), steps=8).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="holds no state of Distillation.*'model' as it was constructed"):
        fit(TinyClassifier(), distillation(), steps=10, ckpt_path=tmp_path / "run.ckpt")
    fit(TinyClassifier(), distillation(teacher=nn.Linear(8, 4)), steps=10, ckpt_path=tmp_path / "run.ckpt")


def test_weights_that_are_loaded_after_the_copy_warn():
    class LoadsLate(TinyClassifier):
        def setup(self, stage):
            torch.nn.init.zeros_(self.model[4].weight)

    module, callback = LoadsLate(), distillation()
    with pytest.warns(UserWarning, match="weights of 'model' changed after Distillation copied its teacher"):
        fit(module, callback)
    fit(module, callback)  # the second fit keeps the teacher on purpose
