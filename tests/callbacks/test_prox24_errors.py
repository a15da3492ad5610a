"""Invariant 6: what cannot work is refused before the first batch, by name and with the remedy."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import Prox24


class NoBatch(TinyModule):
    """Fails if any batch is trained on: the error must come earlier."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("a batch ran before the error")

    validation_step = training_step


def fit(*callbacks, module=None, **arguments):
    quiet_trainer(callbacks=list(callbacks), num_sanity_val_steps=1, **arguments).fit(
        module or NoBatch(), tiny_loader(), tiny_loader()
    )


@pytest.mark.parametrize(
    "arguments, trainer, words",
    [
        ({"freeze": 100}, {}, "freeze=100 is beyond the run, which has 20 optimizer steps"),
        ({"start": 15, "freeze": 0.5}, {}, r"start=15 \(step 15\) comes after freeze=0.5 \(step 10\)"),
        ({}, {"max_steps": -1, "max_epochs": -1}, "fraction of a run whose length is not known"),
        ({"targets": ["modle.*"]}, {}, r"targets pattern 'modle.\*' matches no weight"),
        ({"skip": ["*"]}, {}, r"found no weight that can be 2:4 \(model.0.weight: skip='\*'"),
    ],
)
def test_settings_that_do_not_fit_the_run(arguments, trainer, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(Prox24(**{"start": 0.1, "freeze": 0.6, "verbose": False, **arguments}), **trainer)


def test_a_model_without_eligible_layers():
    class Module(NoBatch):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(6, 4)

    with pytest.raises(MisconfigurationException, match="model.weight: input size 6 does not divide by 4"):
        fit(Prox24(), module=Module())


def test_a_clashing_pruning_callback():
    with pytest.raises(MisconfigurationException, match="Prox24 and ModelPruning would both prune"):
        fit(Prox24(), ModelPruning("l1_unstructured", amount=0.1))


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_cut_parameters(name, monkeypatch):
    trainer = quiet_trainer()
    strategy = FSDPStrategy() if name == "FSDPStrategy" else type(name, (), {})()
    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: strategy))
    with pytest.raises(MisconfigurationException, match=f"cannot work with strategy={name}: .*use .*DDPStrategy"):
        Prox24().setup(trainer, TinyModule(), "fit")


def test_lbfgs():
    class Module(NoBatch):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="cannot work with LBFGS"):
        fit(Prox24(), module=Module())


def test_a_weight_in_two_optimizers_and_a_target_in_none():
    class Twice(NoBatch):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.model[2].parameters(), lr=0.1)]

    class Partly(NoBatch):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model[0].parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"model.2.weight is held by 2 optimizers"):
        fit(Prox24(), module=Twice())
    with pytest.raises(MisconfigurationException, match=r"target model.2.weight is in no optimizer"):
        fit(Prox24(targets=["model.2"]), module=Partly())


def test_two_instances_must_not_share_a_weight():
    first = Prox24(targets=["model.0", "model.2"], name="first")
    second = Prox24(targets=["model.2"], name="second")
    with pytest.raises(MisconfigurationException, match="both take model.2.weight"):
        fit(first, second)


def test_two_instances_with_their_own_weights_and_names_live_side_by_side(tmp_path):
    first = Prox24(2, 6, targets=["model.0"], name="first", verbose=False)
    second = Prox24(4, 8, targets=["model.2"], name="second", verbose=False)
    trainer = quiet_trainer(max_steps=8, callbacks=[first, second])
    trainer.fit(TinyModule(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert {tuple(value["masks"]) for key, value in state.items() if "Prox24" in key} == {
        ("model.0.weight",),
        ("model.2.weight",),
    }


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"start": -1}, ValueError, "start=-1 must be a step"),
        ({"freeze": 1.5}, ValueError, "freeze=1.5 must be a step"),
        ({"start": 0.7, "freeze": 0.5}, ValueError, "start=0.7 comes after freeze=0.5"),
        ({"metric": "hessian"}, ValueError, "metric='hessian' is unknown; use one of weight, activation"),
        ({"strategy": "never"}, ValueError, "strategy='never' is unknown"),
        ({"geometry": "spiral"}, ValueError, "geometry='spiral' is unknown"),
        ({"strategy": "post_step", "refit": "maybe"}, ValueError, "refit='maybe' is unknown"),
        ({"strategy": "post_step", "schedule": "steep"}, ValueError, "schedule='steep' is unknown"),
        ({"refit": "restore"}, ValueError, "refit='restore' belongs to strategy='post_step'"),
        ({"schedule": "linear"}, ValueError, "schedule='linear' belongs to strategy='post_step'"),
        ({"fraction": "steep"}, ValueError, "fraction='steep' is unknown"),
        ({"targets": "model"}, TypeError, "targets takes a list of patterns"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        Prox24(**arguments)
