"""What was best before the freeze was a dense model: no callback may compare the 2:4 model with it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch.optim.lr_scheduler import ReduceLROnPlateau

from prox24_lightning import Prox24, is_24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The `srun` command"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
FREEZE, EPOCH = 12, 4
"""Steps."""


class Scored(TinyModule):
    """Logs a score that is best just before the freeze, and gets better at every validation after it."""

    plateau = "none"

    def validation_step(self, batch, batch_idx):
        step = self.trainer.global_step
        self.log("score", torch.tensor(0.1 if step < FREEZE else 1.0 - step / 1000))

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.plateau == "none":
            return optimizer
        scheduler = ReduceLROnPlateau(optimizer, patience=1)
        config = {"scheduler": scheduler, "monitor": "score", "strict": True}
        return {
            "dict": {"optimizer": optimizer, "lr_scheduler": config},
            "dict with monitor": {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "score"},
            "list": ([optimizer], [config]),
        }[self.plateau]


def fit(*more, module=None, epochs=8, resume=None, checkpointing=True, freeze=FREEZE, **arguments):
    prox, module = Prox24(freeze, freeze, verbose=False), module or Scored()
    trainer = quiet_trainer(
        max_steps=-1, max_epochs=epochs, callbacks=[prox, *more], enable_checkpointing=checkpointing, **arguments
    )
    trainer.fit(module, tiny_loader(EPOCH), tiny_loader(1), ckpt_path=resume)
    return trainer, module, prox


def restarts(owner):
    return pytest.warns(UserWarning, match=f"best score of .*{owner}.* was the dense model's and begins anew")


def test_early_stopping_waits_for_the_sparse_model():
    stop = EarlyStopping("score", patience=2)
    with restarts("EarlyStopping"):
        trainer, _, _ = fit(stop, checkpointing=False)
    assert trainer.global_step == 8 * EPOCH
    assert stop.best_score == pytest.approx(1 - 0.032)


@pytest.mark.parametrize("form", ["dict", "dict with monitor", "list"])
def test_the_learning_rate_waits_for_the_sparse_model(form):
    module = Scored()
    module.plateau = form
    with restarts("ReduceLROnPlateau"):
        trainer, _, _ = fit(module=module, checkpointing=False)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert trainer.lr_scheduler_configs[0].scheduler.best == pytest.approx(1 - 0.032)


def test_the_best_checkpoint_is_a_sparse_one(tmp_path):
    best, three = (
        ModelCheckpoint(tmp_path, monitor="score"),
        ModelCheckpoint(tmp_path / "3", monitor="score", save_top_k=3),
    )
    three.__class__ = type("Three", (ModelCheckpoint,), {})  # another state key
    with restarts("ModelCheckpoint"):
        trainer, module, prox = fit(best, three)
    assert best.best_model_path.endswith("step=32.ckpt")
    assert sorted(int(path.rpartition("=")[2][:-5]) for path in three.best_k_models) == [24, 28, 32]
    before = [path for path in (tmp_path / "3").iterdir() if int(path.stem.rpartition("=")[2]) < FREEZE]
    assert before, "files from before the freeze are not deleted"
    trainer.test(module, tiny_loader(1), ckpt_path=best.best_model_path, verbose=False)
    assert all(is_24(weight.parameter) for weight in prox.weights)


def test_a_stale_score_of_the_dense_model_is_forgotten_too(tmp_path):
    """A checkpoint between the freeze and the next validation is scored by the validation before the freeze."""
    best = ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=1)
    with restarts("ModelCheckpoint"):
        fit(best, freeze=9, epochs=4)
    assert best.best_model_score == pytest.approx(1 - 0.012)


def test_a_resumed_run_goes_on_with_the_record_of_the_sparse_model(tmp_path):
    def best():
        return ModelCheckpoint(tmp_path, monitor="score", save_last=True)

    with restarts("ModelCheckpoint"):
        _, _, _ = fit(first := best(), epochs=5)
    _, _, prox = fit(second := best(), epochs=6, resume=first.last_model_path)
    assert second.best_model_path.endswith("step=24.ckpt")
    assert prox.phase == "frozen"


def test_a_run_that_saved_nothing_since_the_freeze_saves_the_sparse_model(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="score", every_n_epochs=2)
    with (
        restarts("ModelCheckpoint"),
        pytest.warns(UserWarning, match="nothing since the freeze: the 2:4 model is saved"),
    ):
        trainer, module, prox = fit(best, epochs=3, freeze=FREEZE - 1)
    trainer.test(module, tiny_loader(1), ckpt_path="best", verbose=False)
    assert all(is_24(weight.parameter) for weight in prox.weights)


def test_testing_a_checkpoint_from_before_the_freeze_is_named(tmp_path):
    every = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer, module, _ = fit(every)
    with pytest.warns(UserWarning, match="the model is not 2:4 now .*from before the freeze at step 12"):
        trainer.test(module, tiny_loader(1), ckpt_path=tmp_path / "epoch=1-step=8.ckpt", verbose=False)


def test_nothing_is_said_where_nothing_was_remembered(recwarn):
    fit(checkpointing=False)
    assert not [entry for entry in recwarn if "begins anew" in str(entry.message)]


def test_a_plateau_scheduler_that_the_module_steps_itself_is_found():
    class Manual(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.model = TinyModule().model

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(torch.nn.functional.mse_loss(self.model(batch[0]), batch[1]))
            self.optimizers().step()
            self.plateau.step((0.1 if self.trainer.global_step < FREEZE else 1.0) - self.trainer.global_step / 1000)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            self.plateau = ReduceLROnPlateau(optimizer, patience=2)
            return optimizer

    module = Manual()
    with restarts("ReduceLROnPlateau"):
        quiet_trainer(max_steps=20, callbacks=[Prox24(FREEZE, FREEZE, verbose=False)]).fit(module, tiny_loader(20))
    assert module.plateau.optimizer.param_groups[0]["lr"] == 0.01
