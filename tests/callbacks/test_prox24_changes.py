"""What may change between two parts of a run, and what each change does: as the docstring of Prox24 promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24, load_masks
from prox24_lightning.mask import is_24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TARGETS = ["model.0", "model.2"]


def prox(start=0.25, freeze=0.75, **arguments):
    return Prox24(start, freeze, **{"targets": TARGETS, "verbose": False, **arguments})


def fit(*callbacks, steps=16, resume=None, module=None, folder=None):
    callbacks = list(callbacks)
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, callbacks=callbacks, enable_checkpointing=folder is not None
    )
    module = module or TinyModule()
    trainer.fit(module, StatefulLoader(tiny_loader(40)), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of a run of 16 steps: dense until 4, frozen from 12."""
    folder = tmp_path_factory.mktemp("sixteen")
    torch.manual_seed(0)
    fit(prox(), folder=folder)
    return folder


def at(folder, step):
    return folder / f"step={step}.ckpt"


@pytest.mark.parametrize(
    "saved, steps, plan",
    [
        (6, 32, (8, 24)),  # more steps: it was sparsifying, and is dense again until step 8
        (10, 12, (3, 9)),  # fewer: the freeze lies in the past, and happens at once
        (14, 32, (8, 24)),  # frozen stays frozen, though the new plan would still be sparsifying
    ],
)
def test_another_length_of_the_run(checkpoints, saved, steps, plan):
    callback = prox()
    before = torch.load(at(checkpoints, saved), weights_only=True)
    module = fit(callback, steps=steps, resume=at(checkpoints, saved))
    assert (callback.start_step, callback.freeze_step) == plan
    assert (callback.step, callback.phase) == (steps, "frozen")
    assert all(is_24(weight.parameter) for weight in callback.weights)
    if saved == 14:
        old = before["state_dict"]["model.2.weight"] != 0
        assert not (module.model[2].weight.detach()[~old] != 0).any()


@pytest.mark.parametrize("freeze, seen", [(7, 10), (15, 15)])
@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_another_freeze(tmp_path, strategy, freeze, seen):
    """An earlier one, already past, freezes before the next step; a later one when it is reached."""
    fit(prox(4, 12, strategy=strategy), folder=tmp_path)
    callback = prox(4, freeze, strategy=strategy)
    fit(callback, resume=at(tmp_path, 10), folder=tmp_path / "resumed")
    phases = {step: state_of(at(tmp_path / "resumed", step))["phase"] for step in range(11, 17)}
    assert phases == {step: "frozen" if step >= seen else "sparsify" for step in phases}
    assert is_24(callback.weights[1].parameter)


def state_of(path):
    return next(v for k, v in torch.load(path, weights_only=True)["callbacks"].items() if k.startswith("Prox24"))


def test_another_optimizer_in_a_second_fit(tmp_path):
    callback, module = prox(2, 6), TinyModule("adamw")
    trainer = quiet_trainer(max_steps=8, max_epochs=-1, callbacks=[callback])
    trainer.fit(module, tiny_loader(8))
    masks = {name: mask.clone() for name, mask in callback.masks.items()}
    module.optimizer = "sgd"
    trainer.fit_loop.epoch_loop.max_steps = 16
    before = module.model[2].weight.detach().clone()
    trainer.fit(module, tiny_loader(8))
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert (callback.step, callback.phase) == (16, "frozen")
    assert all(torch.equal(mask, masks[name]) for name, mask in callback.masks.items())
    assert is_24(module.model[2].weight)
    assert (module.model[2].weight != before).any()


def test_another_optimizer_on_the_weights_of_a_checkpoint(checkpoints, tmp_path):
    """A plain run with SGD, without the callback: the masks come from their file."""
    callback = prox(masks_file=tmp_path / "masks.safetensors")
    fit(callback, resume=at(checkpoints, 14), folder=tmp_path)
    module = TinyModule("sgd")
    module.load_state_dict(torch.load(at(tmp_path, 16), weights_only=True)["state_dict"])
    load_masks(module, tmp_path / "masks.safetensors", expect="same")
    before = module.model[2].weight.detach().clone()
    fit(module=module, steps=5)
    assert is_24(module.model[2].weight)
    assert (module.model[2].weight != before).any()


def test_a_fit_of_another_model_begins_anew():
    callback = prox()
    fit(callback, steps=16)
    assert callback.phase == "frozen"
    other = TinyModule()
    callback.config = replace(callback.config, start=2, freeze=10)
    with pytest.warns(UserWarning, match="the run ended at step 5 in phase 'sparsify'"):
        fit(callback, Stop(5), steps=12, module=other)
    assert (callback.step, len(callback.masks)) == (5, 0)


class WithTestStep(TinyModule):
    def test_step(self, batch, batch_idx):
        pass


def test_what_a_test_has_read_is_of_the_tested_model(checkpoints):
    callback, module = prox(start=2, freeze=10), WithTestStep()
    quiet_trainer(callbacks=[callback]).test(module, tiny_loader(), ckpt_path=at(checkpoints, 14), verbose=False)
    other = fit(callback, steps=12)
    assert (callback.step, callback.phase) == (12, "frozen")
    assert is_24(other.model[2].weight)
    quiet_trainer(callbacks=[callback]).test(module, tiny_loader(), ckpt_path=at(checkpoints, 14), verbose=False)
    fit(callback, steps=12, module=module)  # has the checkpoint's weights, so it goes on from there
    assert (callback.step, callback.phase) == (26, "frozen")


def test_what_a_failed_fit_has_read_is_forgotten_by_the_next_model(checkpoints):
    callback = prox(start=2, freeze=10, targets=["model.2"])
    with pytest.raises(MisconfigurationException, match="masks belong to other weights"):
        fit(callback, steps=20, resume=at(checkpoints, 14))
    fit(callback, steps=12)
    assert (callback.step, callback.phase) == (12, "frozen")


def test_a_state_that_is_given_by_hand_is_for_the_next_fit(checkpoints):
    callback = prox(start=2, freeze=10)
    fit(callback, steps=12)
    saved = torch.load(at(checkpoints, 14), weights_only=True)
    callback.load_state_dict(saved["callbacks"][callback.state_key])
    other = TinyModule()
    other.load_state_dict(saved["state_dict"])
    fit(callback, steps=12, module=other)
    assert (callback.step, callback.phase) == (26, "frozen")


class Stop(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.steps


def test_a_callback_that_is_removed_takes_its_promise_with_it(checkpoints, tmp_path):
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        module = fit(resume=at(checkpoints, 12), folder=tmp_path)
    assert not is_24(module.model[2].weight), "nothing holds the masks any more"
    callback = prox()
    with pytest.warns(UserWarning, match=r"holds no state of Prox24 .*going on from step 14 as frozen"):
        module = fit(callback, resume=at(tmp_path, 14))
    assert is_24(module.model[2].weight)


@pytest.mark.parametrize("step, ends", [(3, True), (8, False), (14, True)])
def test_another_strategy_before_the_start_and_after_the_freeze(checkpoints, step, ends):
    callback = prox(strategy="post_step")
    if ends:
        fit(callback, resume=at(checkpoints, step))
        assert is_24(callback.weights[0].parameter)
        return
    with pytest.raises(MisconfigurationException, match="while Progressive was making .*, and PostStepProx"):
        fit(callback, resume=at(checkpoints, step))


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("change", [{"targets": ["model.*"]}, {"geometry": "column"}])
def test_other_weights_before_the_start_only(tmp_path, strategy, change):
    fit(prox(strategy=strategy), folder=tmp_path)
    callback = prox(strategy=strategy, **change)
    fit(callback, resume=at(tmp_path, 3))
    assert all(is_24(weight.parameter, dim=weight.dim) for weight in callback.weights)
    words = r"only in the model: \['model.4.weight'\]" if "targets" in change else "another dimension: .*model.0.weight"
    with pytest.raises(MisconfigurationException, match=words):
        fit(prox(strategy=strategy, **change), resume=at(tmp_path, 8))


def test_a_masks_file_that_cannot_be_written_is_refused_before_the_first_batch(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "masks.safetensors").mkdir()
    for path, words in (("file/masks.safetensors", "file is a file"), ("masks.safetensors", "is a folder")):
        trainer = quiet_trainer(max_steps=4, callbacks=[Prox24(1, 2, masks_file=tmp_path / path, verbose=False)])
        with pytest.raises(MisconfigurationException, match=words):
            trainer.fit(TinyModule(), tiny_loader())
        assert trainer.global_step == 0


def test_the_masks_file_must_say_its_format():
    with pytest.raises(ValueError, match="masks_file='masks.pt' must end in .safetensors"):
        Prox24(masks_file="masks.pt")


class Swap(Callback):
    """Exchanges a layer, and its parameters in the optimizer if ``follow``."""

    def __init__(self, step, make=lambda: nn.Linear(16, 16), follow=True):
        self.step, self.make, self.follow = step, make, follow

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        old, new = pl_module.model[2], self.make()
        pl_module.model[2] = new
        group = trainer.optimizers[0].param_groups[0]
        if self.follow:
            kept = [p for p in group["params"] if all(p is not q for q in old.parameters())]
            group["params"] = [*kept, *new.parameters()]


@pytest.mark.parametrize("strategy, refit", [("progressive", "none"), ("post_step", "none"), ("post_step", "restore")])
@pytest.mark.parametrize("step", [2, 8, 16])
def test_a_layer_that_is_exchanged_is_followed(strategy, refit, step):
    callback, module = prox(start=4, freeze=12, strategy=strategy, refit=refit, targets=None), TinyModule("sgd")
    with pytest.warns(UserWarning, match="also these weights become 2:4: model.2.weight"):
        fit(callback, Swap(step), steps=24, module=module)
    assert callback.phase == "frozen"
    assert is_24(module.model[2].weight)
    assert {weight.module for weight in callback.weights} >= {module.model[2]}


@pytest.mark.parametrize("step", [2, 8, 16])
def test_a_layer_that_is_exchanged_without_the_optimizer_stops_the_run_by_name(step):
    with pytest.raises(RuntimeError, match="model.2.weight has been replaced, its whole layer by another one"):
        fit(prox(start=4, freeze=12), Swap(step, follow=False), steps=24, module=TinyModule("sgd"))


@pytest.mark.parametrize("step", [2, 8, 16])
def test_a_layer_that_gives_way_to_one_that_cannot_be_sparse_is_named(step):
    callback, module = prox(start=4, freeze=12, targets=None), TinyModule("sgd")
    with pytest.warns(UserWarning, match=r"for some that stay dense: model.2.weight \(no longer in the model\)"):
        fit(callback, Swap(step, make=nn.Identity), steps=24, module=module)
    assert callback.phase == "frozen"
    assert "model.2.weight" not in callback.masks


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("epoch", [1, 3, 5], ids=["dense", "sparsify", "frozen"])
def test_layers_that_begin_to_train_join(strategy, epoch):
    class Backbone(TinyModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.model[:2], nn.Sequential(*self.model[2:])

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)

    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, lambda_func=lambda _: 1.0, verbose=False)
    callback, module = prox(start=8, freeze=16, strategy=strategy, targets=None), Backbone()
    trainer = quiet_trainer(max_steps=-1, max_epochs=7, callbacks=[unfreeze, callback])
    with pytest.warns(UserWarning, match="also these weights become 2:4: .*backbone.0.weight|model.0.weight"):
        trainer.fit(module, tiny_loader(4))
    assert callback.phase == "frozen"
    assert is_24(module.backbone[0].weight)
    assert is_24(module.head[0].weight)


def test_a_layer_exchanged_within_a_batch_is_masked_when_the_batch_ends():
    """What a callback after Prox24 saves or validates is 2:4, though the new layer has taken a dense step."""
    seen = []

    class Module(TinyModule):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 13:
                self.model[2] = layer = nn.Linear(16, 16)
                group = optimizer.param_groups[0]
                group["params"] = [*self.parameters()]
                assert not is_24(layer.weight)

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step >= 12:
                seen.append(is_24(pl_module.model[2].weight))

    callback = prox()
    with pytest.warns(UserWarning, match="from step 14 on also these weights become 2:4: model.2.weight"):
        fit(callback, Look(), module=Module())
    assert callback.phase == "frozen"
    assert seen == [True] * len(seen)
    assert len(seen) >= 3
