"""What goes wrong in a run: it goes on, or stops with the reason, and the last good state is on the disk."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from resumed_runs import FREEZE, START, STEPS, assert_same, everything, run
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24
from prox24_lightning.sparsify import PostStepProx, Progressive

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TARGETS = ["model.0", "model.2"]
STEP_IN = {"dense": 4, "sparsify": 13, "frozen": 27}
PHASES = pytest.mark.parametrize("step", STEP_IN.values(), ids=STEP_IN.keys())


def fit(prox, *callbacks, module=None, steps=12, **arguments):
    module = module or TinyModule()
    quiet_trainer(max_steps=steps, callbacks=[prox, *callbacks], **arguments).fit(module, tiny_loader(steps))
    return module


def prox(start=2, freeze=8, **arguments):
    return Prox24(start, freeze, targets=TARGETS, verbose=False, **arguments)


class At(Callback):
    """Does something to trainer and module before a step (from 1)."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            self.act(trainer, pl_module)


def lose(trainer, pl_module):
    """The next loss is NaN, and so will be every weight after this step."""
    forward = pl_module.training_step
    pl_module.training_step = lambda *args: forward(*args) * float("nan")


@PHASES
@pytest.mark.parametrize("setting", ["progressive", "activation"])
def test_a_loss_of_nan_stops_the_run_before_it_is_saved(tmp_path, setting, step):
    with pytest.raises(RuntimeError, match=f"NaN or infinite after step {step} .*the last checkpoint before it stays"):
        run(setting, tmp_path, more=[At(step, lose)])
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert newest.name == f"step={step - 1}.ckpt"
    assert torch.load(newest, weights_only=True)["state_dict"]["model.2.weight"].isfinite().all()


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_a_loss_of_nan_without_checkpoints_stops_at_the_freeze_by_name(strategy):
    with pytest.raises(ValueError, match=r"model.\d.weight: cannot choose a 2:4 mask: .* are NaN"):
        fit(prox(strategy=strategy, metric="weight"), At(7, lose))


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_a_layer_that_dies_gets_a_mask_and_the_run_goes_on(strategy):
    callback = prox(strategy=strategy)

    def die(trainer, pl_module):
        pl_module.model[0].weight.data.zero_()
        pl_module.model[0].bias.data.zero_()

    module = fit(callback, *(At(step, die) for step in range(3, 9)))
    assert callback.phase == "frozen"
    assert callback.masks["model.0.weight"].float().mean() == 0.5
    assert is_24(module.model[2].weight)


def test_an_optimizer_swapped_in_the_middle_of_an_epoch_is_followed():
    callback = prox()

    def swap(trainer, pl_module):
        trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.01, momentum=0.9)]

    with pytest.warns(UserWarning, match="the optimizers were replaced during the run"):
        module = fit(callback, At(5, swap))
    # The swap comes after the engine's look at batch 5, so one step is not counted.
    assert (callback.step, callback.phase) == (11, "frozen")
    assert is_24(module.model[2].weight)


def replace(trainer, pl_module, follow):
    old = pl_module.model[2].weight
    new = pl_module.model[2].weight = nn.Parameter(old.detach().clone())
    if follow:
        group = trainer.optimizers[0].param_groups[0]
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


@pytest.mark.parametrize("step", [5, 10], ids=["sparsify", "frozen"])
def test_a_parameter_replaced_in_the_optimizer_too_is_followed(step):
    callback = prox()
    module = fit(callback, At(step, lambda *args: replace(*args, follow=True)))
    assert callback.phase == "frozen"
    assert is_24(module.model[2].weight)
    assert len(module.model[2].weight._post_accumulate_grad_hooks or {}) == 0, "let go at the end"


@pytest.mark.parametrize("step", [1, 5, 10], ids=["dense", "sparsify", "frozen"])
def test_a_parameter_that_the_optimizer_does_not_train_is_named(step):
    with pytest.raises(RuntimeError, match="model.2.weight has been replaced by another parameter"):
        fit(prox(), At(step, lambda *args: replace(*args, follow=False)))


def test_weights_tied_during_the_run_are_named():
    def tie(trainer, pl_module):
        pl_module.model[2].weight = pl_module.model[0].weight

    class Square(TinyModule):
        def __init__(self):
            super().__init__()
            self.model[0] = nn.Linear(8, 8)
            self.model[2] = nn.Linear(8, 8)
            self.model[4] = nn.Linear(8, 4)

    with pytest.raises(RuntimeError, match=r"model.2.weight has been replaced .*\(or tied to another weight\)"):
        fit(prox(), At(5, tie), module=Square())


def interrupt(trainer, pl_module):
    raise KeyboardInterrupt


@PHASES
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_to_the_same_end(tmp_path, step):
    unbroken = everything(*run("progressive", tmp_path / "whole"))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("progressive", tmp_path / "broken", more=[At(step, interrupt)])
    newest = max((tmp_path / "broken").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert newest.name == f"step={step - 1}.ckpt"
    assert_same(unbroken, everything(*run("progressive", tmp_path / "resumed", resume=newest)))


def test_ctrl_c_removes_the_hooks():
    module = TinyModule()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(prox(), At(6, interrupt), module=module)
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_the_steps_of_this_file_hit_each_phase():
    assert 0 < STEP_IN["dense"] <= START < STEP_IN["sparsify"] < FREEZE < STEP_IN["frozen"] < STEPS


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize(
    "strategy, where", [("progressive", "finish"), ("post_step", "finish"), ("progressive", "begin")]
)
def test_an_interrupt_in_the_freeze_leaves_the_phase_as_it_was(monkeypatch, tmp_path, error, strategy, where):
    """A second fit, and a resume from what was saved on the way out, end 2:4."""
    kind = {"progressive": Progressive, "post_step": PostStepProx}[strategy]
    original = getattr(kind, where)
    stopped = []

    def stop_once(self, *args):
        if stopped:
            return original(self, *args)
        stopped.append(True)
        raise error("stop")

    monkeypatch.setattr(kind, where, stop_once)
    callback, module = prox(strategy=strategy), TinyModule()

    class Save(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    with pytest.raises((error, SystemExit)):
        fit(callback, Save(), module=module)
    assert callback.phase != "frozen"
    fit(callback, module=module)
    assert callback.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in callback.weights)
    resumed, other = prox(strategy=strategy), TinyModule()
    loader = StatefulLoader(tiny_loader(12))
    quiet_trainer(max_steps=12, callbacks=[resumed]).fit(other, loader, ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in resumed.weights)
