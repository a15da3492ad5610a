"""Runs that die of ``kill -9`` and are taken up by another process.

One process forks, and each run is a process of its own: what it knew is gone with it.
"""

from __future__ import annotations

import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback
from resumed_runs import FREEZE, SETTINGS, START, STEPS, run, run_and_save

MOMENTS = ("forward", "backward", "step", "saving")


class Kill(NamedTuple):
    """Setting of the run, step in which it is killed (from 1), and at what moment of that step."""

    setting: str
    step: int
    moment: str


def kills(count: int = 10) -> list[Kill]:
    """Every setting, phase and moment in turn, at steps drawn from a fixed seed."""
    draw = random.Random(7)
    phases = [(2, START), (START + 1, FREEZE), (FREEZE + 1, STEPS)]
    settings = list(SETTINGS)
    return [Kill(settings[i % len(settings)], draw.randint(*phases[i % 3]), MOMENTS[i % 4]) for i in range(count)]


class KillYourself(Callback):
    """Ends the process at once, with nothing flushed and nothing closed."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill
        self.steps = 0

    def at(self, moment: str) -> None:
        if (self.steps, moment) == (self.kill.step, self.kill.moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps += 1
        self.at("forward")

    def on_after_backward(self, trainer, pl_module):
        self.at("backward")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.at("step")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.at("saving")


def in_a_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit code, negative for the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> None:
    """Leave in ``folder`` what each setting's unbroken run ends with, and each killed and resumed run."""

    def save(name: str, setting: str, where: str, resume: Path | None = None) -> None:
        run_and_save(setting, folder / where, resume, folder / name)

    for setting in SETTINGS:
        assert in_a_child(lambda setting=setting: save(f"{setting}.pt", setting, f"unbroken_{setting}")) == 0
    for index, kill in enumerate(kills()):
        where = f"killed_{index}"
        killed = in_a_child(lambda kill=kill, where=where: run(kill.setting, folder / where, more=[KillYourself(kill)]))
        assert killed == -signal.SIGKILL, f"{kill} ended with {killed}"
        newest = max((folder / where).glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
        resumed = in_a_child(
            lambda kill=kill, index=index, newest=newest: save(f"{index}.pt", kill.setting, f"resumed_{index}", newest)
        )
        assert resumed == 0, f"{kill} could not be resumed"
