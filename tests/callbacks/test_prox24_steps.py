"""Invariant 2: the prox runs exactly once after every real optimizer step, whatever drives the optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24
from prox24_lightning.solvers.input_group import solve_input_group
from prox24_lightning.sparsify import PostStepProx
from prox24_lightning.sparsify.strategies.progressive import solve_block

TARGET = "model.2.weight"


@pytest.fixture
def applied(monkeypatch):
    """Counts the applications of the prox for every weight."""
    counts: dict[str, int] = {}
    original = PostStepProx.apply

    def apply(self, weight, progress, scale):
        counts[weight.name] = counts.get(weight.name, 0) + 1
        original(self, weight, progress, scale)

    monkeypatch.setattr(PostStepProx, "apply", apply)
    return counts


def prox(**arguments):
    return Prox24(
        **{"start": 0, "freeze": 1000, "targets": [TARGET], "strategy": "post_step", "verbose": False, **arguments}
    )


def fit(module, callback, steps, **arguments):
    trainer = quiet_trainer(max_steps=-1, max_epochs=2, callbacks=[callback], **arguments)
    callback.config = replace(callback.config, freeze=steps)
    trainer.fit(module, tiny_loader(batches=7))
    return trainer


def test_every_batch_is_a_step(applied):
    callback = prox()
    fit(TinyModule(), callback, steps=14)
    assert callback.step == 14
    assert applied[TARGET] == 13, "the last step freezes instead"


def test_gradient_accumulation(applied):
    callback = prox()
    fit(TinyModule(), callback, steps=6, accumulate_grad_batches=3)
    assert callback.step == 6
    assert applied[TARGET] == 5


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_steps_that_the_gradient_scaler_skips_do_not_count(applied, optimizer):
    class Overflows(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (1, 3) else loss

    callback = prox()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with pytest.warns(UserWarning, match="run ended at step 10"):
        fit(Overflows(optimizer), callback, steps=14, plugins=plugin)
    assert callback.step == 10
    assert applied[TARGET] == 10


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:the weights are stored in torch.bfloat16")
def test_low_precision(applied, precision):
    callback, module = prox(), TinyModule()
    fit(module, callback, steps=14, precision=precision, gradient_clip_val=0.5)
    assert applied[TARGET] == 13
    assert is_24(module.model[2].weight)


class TwoOptimizers(TinyModule):
    """Manual optimisation: two optimizers, one steps twice as often; the second through a closure."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers(use_pl_optimizer=self.wrapped)
        loss = super().training_step(batch, batch_idx)
        often.zero_grad()
        seldom.zero_grad()
        self.manual_backward(loss)
        often.step()
        if batch_idx % 2 == 0:
            seldom.step(closure=lambda: loss.detach())

    def configure_optimizers(self):
        return [torch.optim.Adam(self.model[2].parameters()), torch.optim.SGD(self.model[0].parameters(), lr=0.1)]


@pytest.mark.parametrize("wrapped", [True, False])
def test_manual_optimisation_with_two_optimizers(applied, wrapped):
    module = TwoOptimizers()
    module.wrapped = wrapped
    callback = prox(targets=[TARGET, "model.0.weight"], metric="weight", freeze=7)
    quiet_trainer(max_steps=-1, max_epochs=1, callbacks=[callback]).fit(module, tiny_loader(batches=7))
    assert applied == {TARGET: 4, "model.0.weight": 2}, "steps count over both optimizers; the seventh freezes"
    assert callback.step == 11


def test_an_optimizer_whose_step_calls_its_parents_step(applied):
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Module(TinyModule):
        def configure_optimizers(self):
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # patches the parent class for the process
            return Twice(self.parameters(), lr=0.1)

    callback = prox()
    fit(Module(), callback, steps=14)
    assert callback.step == 14


def test_parameter_groups(applied):
    class Module(TinyModule):
        def configure_optimizers(self):
            first, second = self.model[0].parameters(), self.model[2].parameters()
            return torch.optim.AdamW([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.01}])

    callback = prox(targets=["model.0", "model.2"])
    fit(Module(), callback, steps=14)
    assert applied == {"model.0.weight": 13, TARGET: 13}


def test_a_compiled_model(applied):
    # What was compiled by other tests, without our hooks, must not be taken for this model.
    torch._dynamo.reset()
    module = TinyModule()
    module.model = torch.compile(module.model, backend="eager")
    callback = prox(targets=["model.2"])
    fit(module, callback, steps=14)
    assert applied == {TARGET: 13}
    assert callback.controller.metric_scale(TARGET) is not None, "layer inputs are seen inside a compiled module too"


def test_the_progressive_strategy_solves_layers_inside_a_compiled_model(monkeypatch):
    torch._dynamo.reset()
    solved = []

    def spy(weights, moments, **options):
        solved.extend((weight.name, moments.tokens) for weight in weights)
        return solve_input_group(weights, moments, **options)

    monkeypatch.setattr(solve_block, "solve_input_group", spy)
    module = TinyModule()
    module.model = torch.compile(module.model, backend="eager")
    callback = Prox24(2, 18, targets=["model.0", "model.2"], verbose=False)
    quiet_trainer(max_steps=20, callbacks=[callback]).fit(module, tiny_loader(batches=20))
    batch = len(next(iter(tiny_loader()))[0])
    assert solved == [("model.0.weight", 8 * batch), (TARGET, 8 * batch)], "the last eight batches of each turn"
    assert callback.phase == "frozen"


class StopOnce(Callback):
    """Ends the first fit after ``steps`` steps, as early stopping or a time limit would."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.should_stop = True


def test_a_second_fit_goes_on_where_the_first_stopped(applied):
    callback, module = prox(freeze=14), TinyModule()
    trainer = quiet_trainer(max_steps=14, max_epochs=-1, callbacks=[callback, StopOnce(5)])
    with pytest.warns(UserWarning, match="run ended at step 5 in phase 'sparsify', before the freeze at step 14"):
        trainer.fit(module, tiny_loader(batches=20))
    assert not module.model[2].weight._post_accumulate_grad_hooks
    trainer.fit(module, tiny_loader(batches=20))
    assert (callback.step, callback.phase) == (14, "frozen")
    assert applied[TARGET] == 13


def test_hooks_are_gone_after_a_fit_and_after_an_exception():
    class Fails(TinyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("a bug of the user")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            self.kept = super().configure_optimizers()
            return self.kept

    for module, error in (
        (Fails(), pytest.raises(RuntimeError, match="a bug of the user")),
        (TinyModule(), nullcontext()),
    ):
        callback = prox()
        with error:
            fit(module, callback, steps=14)
        assert not module.model[2]._forward_pre_hooks
        optimizer = getattr(module, "kept", None)
        if optimizer is not None:
            assert not optimizer._optimizer_step_post_hooks
            assert not optimizer._optimizer_step_pre_hooks
