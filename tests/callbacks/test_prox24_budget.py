"""Prox24(budget=): the layers that 2:4 hurts most stay dense, from the start of the phase on and after a resume."""

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_blocks import Model
from tiny_runs import StatefulLoader, quiet_trainer
from torch import nn

from prox24_lightning import Prox24, is_24
from prox24_lightning.solvers.budget.portfolio import choose_by_loss
from prox24_lightning.solvers.budget.rules import RULES
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.weights.selection import select_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.model(batch), torch.zeros(()).expand(2, 20, 5))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(count=24):
    generator = torch.Generator().manual_seed(1)
    return StatefulLoader([torch.randn(2, 20, 8, generator=generator) for _ in range(count)])


def run(*, budget, steps=24, folder=None, resume=None, start=4, freeze=20, **kwargs):
    seed_everything(0, verbose=False)
    prox = Prox24(start, freeze, verbose=False, budget=budget, skip=["model.embed"], **kwargs)
    more = [] if folder is None else [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")]
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, callbacks=[prox, *more], enable_checkpointing=folder is not None
    )
    found = Module()
    trainer.fit(found, loader(), ckpt_path=resume)
    return found, prox


def dense_names(prox):
    return {weight.name for weight in prox.selection.skipped if weight.reason.startswith("budget")}


def test_a_share_of_the_weights_stays_dense():
    found, prox = run(budget=0.3)
    dense = dense_names(prox)
    everything = {weight.name: weight for weight in select_weights(found, skip=["model.embed"])}
    assert 1 <= len(dense) <= 3
    assert set(prox.masks) == set(everything) - dense
    assert prox.phase == "frozen"
    for name, weight in everything.items():
        assert bool(is_24(weight.parameter)) == (name not in dense)


def test_all_at_one_step():
    found, prox = run(budget=0.3, start=6, freeze=6)
    assert dense_names(prox)
    assert all(is_24(found.get_parameter(name)) for name in prox.masks)


def test_with_another_order_of_inputs():
    found, prox = run(budget=0.3, reorder_inputs=True)
    assert dense_names(prox)
    assert all(is_24(found.get_parameter(name)) for name in prox.masks)


@pytest.mark.parametrize("step", [3, 10, 22])
def test_a_resumed_run_keeps_the_choice(tmp_path, step):
    whole, prox = run(budget=0.3, folder=tmp_path / "whole")
    resumed, again = run(budget=0.3, folder=tmp_path / "again", resume=tmp_path / "whole" / f"step={step}.ckpt")
    assert dense_names(again) == dense_names(prox)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_second_fit_keeps_the_choice():
    found, prox = run(budget=0.3)
    dense = dense_names(prox)
    trainer = quiet_trainer(max_steps=24, callbacks=[prox])
    trainer.fit(found, loader())
    assert dense_names(prox) == dense
    assert all(is_24(found.get_parameter(name)) for name in prox.masks)


def test_the_budget_goes_to_what_hurts_most():
    """A layer of which 2:4 takes nothing away is never left dense."""
    seed_everything(0, verbose=False)
    found = Module()
    with torch.no_grad():
        for layer in found.model.layers:
            layer.left.weight[:, ::2] *= 1e-3
    prox = Prox24(0, 16, verbose=False, budget=0.4, skip=["model.embed"])
    found.configure_optimizers = lambda: torch.optim.SGD(found.parameters(), lr=0.0)
    quiet_trainer(max_steps=20, callbacks=[prox]).fit(found, loader())
    assert dense_names(prox)
    assert not any("left" in name for name in dense_names(prox))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"budget": 1.0}, "budget=1.0 must lie in"), ({"budget": 0.1, "strategy": "post_step"}, "belongs to strategy")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**settings)


def test_a_loss_that_cannot_be_measured_leaves_each_layers_own(monkeypatch, caplog):
    def failing(self):
        raise RuntimeError("odd output")

    monkeypatch.setattr("prox24_lightning.calibration.model_loss.ModelLoss.__call__", failing)
    found, prox = run(budget=0.3)
    assert "odd output" in caplog.text
    assert dense_names(prox)
    assert all(is_24(found.get_parameter(name)) for name in prox.masks)


def test_the_choice_is_judged_on_whole_models_and_within_the_budget(monkeypatch):
    made = []

    def spied(*args, **kwargs):
        made.append(choose_by_loss(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("prox24_lightning.solvers.budget.measure.choose_by_loss", spied)
    found, prox = run(budget=0.3)
    assert dense_names(prox) == made[0].dense
    assert {*RULES, "mixed prices"} <= dict(made[0].tried).keys()
    sizes = {weight.name: weight.parameter.numel() for weight in select_weights(found, skip=["model.embed"])}
    assert sum(sizes[name] for name in made[0].dense) <= 0.3 * sum(sizes.values()) * (1 + 1e-6)
