"""The monitor's history over checkpoints, several fits and several monitors."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monitored_runs import LAYERS, fit, monitor, prox, rows_of
from tiny_runs import TinyModule, quiet_trainer, tiny_loader


def checkpointed(folder, steps, resume=None):
    callback = monitor(every=4)
    checkpoint = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{step}")
    fit([callback, prox(), checkpoint], steps=steps, batches=4, resume=resume, enable_checkpointing=True)
    return callback.histories["prox24"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_keeps_the_history(tmp_path):
    checkpointed(tmp_path, steps=20)
    path = tmp_path / "step=8.ckpt"
    torch.load(path, weights_only=True)
    history = checkpointed(tmp_path, steps=20, resume=path)
    assert history.steps == [0, 4, 5, 8, 12, 16, 20]
    assert history.phases == [(0, "dense"), (5, "sparsify"), (12, "frozen")]
    assert history.groups_24[0] == 0.0
    assert history.groups_24[-1] == 1.0
    assert 0 < history.groups_24[3] < 1


def test_a_history_that_cannot_be_read_is_reported(tmp_path):
    callback = monitor()
    callback.load_state_dict({"prox24": {"version": 99, "layers": LAYERS}})
    with pytest.warns(UserWarning, match="reading the history in the checkpoint failed.* version 99 cannot be read"):
        fit([callback, prox()])
    assert callback.histories["prox24"].steps[0] == 0


def test_a_second_fit_of_one_trainer_goes_on():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 6

    callback, module = monitor(every=4), TinyModule()
    trainer = quiet_trainer(max_steps=12, max_epochs=-1, callbacks=[callback, Stop()])
    trainer.fit(module, tiny_loader(20))
    assert callback.histories["model"].steps == [0, 4, 6]
    trainer.fit(module, tiny_loader(20))
    assert callback.histories["model"].steps == [0, 4, 6, 8, 12]


def test_a_new_trainer_starts_a_new_history():
    callback = monitor(every=4)
    fit([callback], steps=8)
    fit([callback], steps=4)
    assert callback.histories["model"].steps == [0, 4]


def test_a_new_run_of_a_sparse_model_is_logged_from_its_first_step(tmp_path):
    callback, logger = monitor(), CSVLogger(tmp_path)
    _, module = fit([callback, prox()])
    fit([callback, prox(start=0, freeze=0)], module, logger=logger)
    rows = rows_of(logger)
    assert list(rows) == [0, 4, 9, 14, 19]
    assert rows[0]["sparsity/groups_24"] == 1.0
    assert callback.histories["prox24"].phases == [(0, "frozen")]


def test_a_run_that_fails_at_its_start_gets_no_figure_of_the_run_before(tmp_path):
    callback, logger = monitor(overview=True), CSVLogger(tmp_path)
    fit([callback, prox()])
    with pytest.raises(MisconfigurationException, match="'nope' matches no weight"):
        fit([callback, prox(targets=["nope"])], logger=logger)
    assert not list(tmp_path.rglob("*.png"))


def test_a_second_fit_without_a_batch_prints_no_table_again(capsys):
    callback, module = monitor(summary=True), TinyModule()
    trainer, _ = fit([callback], module)
    capsys.readouterr()
    trainer.fit(module, tiny_loader(20))
    assert "weights are 2:4" not in capsys.readouterr().out


def test_two_monitors_do_not_collide(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([monitor(), monitor(every=10, name="seldom"), prox()], logger=logger)
    assert any("seldom/groups_24" in row for row in rows_of(logger).values())
