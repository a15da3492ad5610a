"""A run that a signal ends while it solves a layer: ``python stopped_runs.py SIGNAL FOLDER``. The solve never ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24
from prox24_lightning.solvers import config


class SendSignal(Callback):
    """Sends the signal once a block is being solved, and reports what is left of the run."""

    def __init__(self, number: int, prox: Prox24) -> None:
        self.number, self.prox, self.sent = number, prox, 0.0

    def on_train_start(self, trainer, pl_module):
        threading.Thread(target=self.wait, daemon=True).start()

    def wait(self):
        while not self.prox.controller.watch._state.block:
            time.sleep(0.01)
        time.sleep(0.3)
        self.sent = time.perf_counter()
        os.kill(os.getpid(), self.number)

    def on_exception(self, trainer, pl_module, exception):
        took = time.perf_counter() - self.sent
        sparse = [is_24(weight.parameter) for weight in self.prox.weights]
        print(f"kind={type(exception).__name__} seconds={took:.2f} phase={self.prox.phase} sparse={any(sparse)}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    config.DEFAULT_STEPS["prox"] = 10**9
    prox = Prox24(2, 10, verbose=False)
    callbacks = [SendSignal(getattr(signal, sys.argv[1]), prox), prox, OnExceptionCheckpoint(Path(sys.argv[2]))]
    trainer = quiet_trainer(callbacks=callbacks, max_steps=12, enable_checkpointing=True)
    trainer.fit(TinyModule(), StatefulLoader(tiny_loader(12)))
