"""While it solves, Prox24 shows where it is, and can be stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, SparsityMonitor, is_24
from prox24_lightning.callbacks import solve_display
from prox24_lightning.sparsify import solve_watch


@pytest.fixture(autouse=True)
def _every_pause_is_shown(monkeypatch):
    monkeypatch.setattr(solve_watch, "_FIRST_SHOWN", 0.0)
    monkeypatch.setattr(solve_watch, "_SHOWN_EVERY", 0.0)


def fit(*callbacks, ckpt_path=None, **arguments):
    prox = Prox24(2, 10)
    trainer = quiet_trainer(callbacks=[prox, *callbacks], **{"max_steps": 12, **arguments})
    trainer.fit(module := TinyModule(), StatefulLoader(tiny_loader(12)), ckpt_path=ckpt_path)
    return trainer, prox, module


def test_a_bar_in_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(TQDMProgressBar(), enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "Solving block 1 of 3 (model.0)" in shown
    assert re.search(r"Solving block 3 of 3 \(model.4\)(, \d+ s left)? \|.*\| 2/3", shown)


def test_a_bar_in_rich(capsys):
    bar = RichProgressBar(console_kwargs={"force_terminal": True, "width": 160})
    fit(bar, enable_progress_bar=True)
    shown = capsys.readouterr().out
    assert "Solving block 1 of 3 (model.0)" in shown
    assert "Solving block 3 of 3 (model.4)" in shown
    assert bar.train_progress_bar.description.startswith("Epoch")
    assert [task.visible for task in bar.progress.tasks if task.description.startswith("Solving")] == [False]


@pytest.mark.parametrize("arguments", [{"enable_progress_bar": False}, {"enable_progress_bar": True}])
def test_lines_where_there_is_no_terminal(caplog, monkeypatch, arguments):
    lines = solve_display.LogLines
    monkeypatch.setattr(solve_display, "LogLines", lambda say, name: lines(say, name, first=0.0))
    with caplog.at_level("INFO"):
        fit(**arguments)
    assert "prox24: solving block 1 of 3 (model.0)" in caplog.text
    assert "prox24: solved up to block 3 of 3 in" in caplog.text
    phases = [message for message in caplog.messages if "phase" in message]
    steps = ("dense at step 0", "sparsify after step 3", "frozen after step 10")
    assert phases == [f"prox24: phase {step}" for step in steps]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_says_where_it_goes_on(caplog, capsys, tmp_path):
    fit(ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    caplog.clear()
    capsys.readouterr()
    with caplog.at_level("INFO"):
        fit(max_steps=24, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [message for message in caplog.messages if "phase" in message] == ["prox24: phase frozen at step 12"]
    shown = capsys.readouterr().out
    assert "prox24: goes on from a checkpoint" in shown
    assert "become 2:4" not in shown


def test_the_share_in_the_bar_is_fresh_after_each_pruning_step():
    shares = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, *args):
            masks = next(cb for cb in trainer.callbacks if isinstance(cb, Prox24)).masks
            shares.append((len(masks), self.get_metrics(trainer, trainer.lightning_module)["2:4"]))
            super().on_train_batch_end(trainer, *args)

    trainer = quiet_trainer(
        callbacks=[Prox24(2, 30, verbose=False), SparsityMonitor(1000, summary=False, overview=False), Bar()],
        enable_progress_bar=True,
        max_steps=32,
    )
    trainer.fit(TinyModule(), tiny_loader(32))
    assert dict(shares)[3] == 1.0
    assert dict(shares)[0] < dict(shares)[1] < dict(shares)[2] < 1.0


@pytest.mark.parametrize("name, kind", [("SIGTERM", "SIGTERMException"), ("SIGINT", "KeyboardInterrupt")])
def test_a_signal_stops_a_solve(tmp_path, name, kind):
    script = Path(__file__).parent.parent / "helpers" / "stopped_runs.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, name, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    said = done.stdout + done.stderr
    found = re.search(r"kind=(\w+) seconds=([\d.]+) phase=(\w+) sparse=(\w+)", said)
    assert found is not None, said
    assert (found[1], found[3], found[4]) == (kind, "sparsify", "False")
    assert float(found[2]) < 2
    assert re.search(
        r"prox24: stopped after step \d+, in phase 'sparsify', while it solved block 1 of 3 \(model.0\): weights are "
        r"as before; go on with trainer.fit\(..., ckpt_path='.*on_exception.ckpt'\)",
        said,
    ), said
    resumed = Prox24(2, 10, verbose=False)
    trainer = quiet_trainer(max_steps=12, callbacks=[resumed])
    trainer.fit(TinyModule(), StatefulLoader(tiny_loader(12)), ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in resumed.weights)


@pytest.mark.parametrize("saves", [True, False])
def test_a_stopped_run_names_its_newest_checkpoint(tmp_path, caplog, saves):
    class Stop(TinyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    checkpoint = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)] if saves else []
    trainer = quiet_trainer(callbacks=[Prox24(9, 10, verbose=False), *checkpoint], enable_checkpointing=saves)
    with caplog.at_level("INFO"), pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(Stop(), tiny_loader(12))
    remedy = (
        rf"go on with trainer.fit\(..., ckpt_path='{tmp_path}/step=4.ckpt'\)" if saves else "no checkpoint to go on"
    )
    assert re.search(rf"stopped after step 5, in phase 'dense'; .*{remedy}", caplog.text)
