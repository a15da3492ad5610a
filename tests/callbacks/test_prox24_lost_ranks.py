"""A rank that dies, hangs or computes NaN: the other one stops with the reason, in time, and all files stay whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from new_processes import START, enter_group, free_port
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24

pytestmark = pytest.mark.slow

TIMEOUT, SOON = 8.0, 60.0
"""Seconds: of the process group, and until the processes have ended (these machines are slow)."""
FAULT = 6
"""The step of the fault: one layer is sparse, and the other one waits for its pruning step."""


class Fault(Callback):
    """Makes one rank die, hang or compute NaN at a step."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != FAULT or trainer.global_rank != 1:
            return
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hangs":
            time.sleep(SOON)
        if self.kind == "nan":
            batch[0].fill_(float("nan"))


def work(rank: int, port: int, kind: str, folder: Path) -> None:
    enter_group(rank, port)
    prox = Prox24(2, 10, targets=["model.0", "model.2"], verbose=False, masks_file=folder / "masks.safetensors")
    trainer = quiet_trainer(
        max_steps=14,
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=TIMEOUT)),
        enable_checkpointing=True,
        callbacks=[Fault(kind), prox, ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
    )
    begin = time.monotonic()
    try:
        trainer.fit(TinyModule(), tiny_loader(batches=64))
        found = "no error"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    text = json.dumps({"error": found, "seconds": time.monotonic() - begin})
    (folder / f"rank{rank}.json").write_text(text)
    os._exit(0)  # the group is broken: nothing more is sent over it


@pytest.fixture(scope="module", params=["dies", "hangs", "nan"])
def left(request, tmp_path_factory):
    """The kind of the fault, and the folder that the two ranks left."""
    folder = tmp_path_factory.mktemp(request.param)
    context, port = multiprocessing.get_context(START), free_port()
    ranks = [context.Process(target=work, args=(rank, port, request.param, folder)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    ranks[0].join(SOON)
    alive = ranks[0].is_alive()
    for process in ranks:
        process.kill()
        process.join()
    assert not alive, "the first rank waits for the one that is lost"
    return request.param, folder


def test_the_others_stop_with_the_reason_in_time(left):
    kind, folder = left
    found = json.loads((folder / "rank0.json").read_text())
    assert found["seconds"] < SOON
    if kind == "nan":
        assert f"weights are NaN or infinite after step {FAULT + 1}" in found["error"]
        assert json.loads((folder / "rank1.json").read_text())["error"] == found["error"]
    else:
        words = found["error"].lower()
        assert any(word in words for word in ("closed", "reset", "timed out", "timeout", "abort")), found["error"]


def test_nothing_on_the_disk_is_damaged(left):
    _, folder = left
    steps = sorted(int(path.stem.removeprefix("step=")) for path in folder.glob("step=*.ckpt"))
    assert steps == list(range(1, FAULT + 1)), "those before the fault, and none after it"
    for path in folder.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in saved["state_dict"].values())
    known = {"rank0.json", "rank1.json", *(f"step={step}.ckpt" for step in steps)}
    assert {path.name for path in folder.iterdir()} <= known, "no masks before the freeze, no parts of files"
    assert not dist.is_initialized()


def test_a_run_goes_on_from_the_last_checkpoint(left):
    _, folder = left
    prox = Prox24(2, 10, targets=["model.0", "model.2"], verbose=False)
    trainer = quiet_trainer(max_steps=14, callbacks=[prox])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(TinyModule(), tiny_loader(batches=64), ckpt_path=folder / f"step={FAULT}.ckpt")
    assert prox.phase == "frozen"
