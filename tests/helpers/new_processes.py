"""Processes that tests start. They are forked from one that has imported everything, which takes five seconds else."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

START = "forkserver"
"""How processes start; what is handed over is pickled, as with ``"spawn"``. Not for Lightning's own start of processes:
with this one they train the same memory."""

multiprocessing.set_forkserver_preload(
    [
        "lightning.pytorch",
        "prox24_lightning.callbacks.convert_and_benchmark",
        "prox24_lightning.callbacks.distillation",
        "prox24_lightning.callbacks.prox24",
        "prox24_lightning.callbacks.sparsity_monitor",
        "prox24_lightning.oneshot",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ]
)


def in_new_process(work: Callable[..., None], *arguments) -> None:
    """Run ``work(*arguments)`` in a new process; an error there is one here."""
    mp.start_processes(_alone, (work, arguments), nprocs=1, start_method=START)


def _alone(rank: int, work: Callable[..., None], arguments: tuple) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work(*arguments)


def spawn(work: Callable[..., None], *arguments, seconds: float = 280) -> None:
    """Run ``work(rank, *arguments)`` in two processes that find each other as torchrun's would, ``seconds`` at most."""
    context = mp.start_processes(_enter, (work, free_port(), arguments), nprocs=2, join=False, start_method=START)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes have not ended in {seconds} s")
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank: int, work: Callable[..., None], port: int, arguments: tuple) -> None:
    enter_group(rank, port)
    work(rank, *arguments)


def enter_group(rank: int, port: int) -> None:
    """Prepare this process as torchrun would prepare one of two."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in names.items()})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
