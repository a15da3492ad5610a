"""Runs of a small model of attention blocks over two processes, on CPUs or GPUs; importable by spawned processes."""

from __future__ import annotations

import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tiny_runs import StatefulLoader, quiet_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from prox24_lightning import Prox24
from prox24_lightning.solvers.config import DEFAULT_STEPS
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.weights.sharded import gathered, whole

STEPS, START, FREEZE = 22, 2, 18
"""Each of the two blocks has a pruning step of its own: 8 batches lie between them."""
LAYERS, SOLVES = 12, 2
"""2:4 layers of the decoder, and pruning steps."""
MIDDLE, FROZEN = 12, 20
"""Steps at which checkpoints are written: one block is sparse, and all are."""
WIDTH, HEADS, FEATURES = 32, 4, 8
TIMEOUT = timedelta(seconds=60)


class Block(nn.Module):
    """Pre-norm attention and MLP, whose number of heads follows from the size of the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


TENSOR_PLAN = {name: ColwiseParallel() for name in ("q", "k", "v", "up")} | {
    name: RowwiseParallel() for name in ("o", "down")
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ParallelModule(LightningModule):
    """Trains a decoder that is whole (``""``, ``"ddp"``), or sharded by FSDP2 (``"fsdp2"``) or ``"tensor"``
    parallelism."""

    def __init__(self, parallel: str, *, compiled: bool = False, policy: bool = False, model: nn.Module | None = None):
        super().__init__()
        self.model = Decoder() if model is None else model
        self.parallel, self.compiled, self.policy = parallel, compiled, policy

    def configure_model(self) -> None:
        if self.compiled:
            for block in self.model.blocks:
                block.compile(backend="inductor" if torch.cuda.is_available() else "aot_eager")
        if self.parallel == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.policy else MixedPrecisionPolicy()
            for part in (self.model.embed, *self.model.blocks, self.model.head):
                fully_shard(part, mesh=mesh, mp_policy=policy)
            fully_shard(self.model, mesh=mesh, mp_policy=policy)
        if self.parallel == "tensor":
            for block in self.model.blocks:
                parallelize_module(block, self.device_mesh["tensor_parallel"], TENSOR_PLAN)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.model(x).to(y.dtype), y)

    def configure_optimizers(self):
        # Adam would make steps of full size from gradients that are rounding errors (of the keys' bias: exactly zero).
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, foreach=False)


class MaskRecord(Callback):
    """Notes a hash of all masks, gathered, whenever there are more of them."""

    def __init__(self, prox: Prox24) -> None:
        self.prox = prox
        self.found: list[tuple[int, int, str]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        masks = self.prox.masks
        if len(masks) != (self.found[-1][1] if self.found else 0):
            parameters = {weight.name: weight.parameter for weight in self.prox.weights}
            every = [whole(masks[name], parameters[name]) for name in sorted(masks)]
            self.found.append((self.prox.step, len(masks), checksum(every)))


def loader(split: bool, *, dtype: torch.dtype = torch.float32) -> StatefulLoader:
    """Eight sequences a step: all of them, or this rank's four."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 8, 8, FEATURES, generator=generator, dtype=dtype)
    y = torch.tanh(x.cumsum(2) @ torch.randn(FEATURES, 4, generator=generator, dtype=dtype))
    share = slice(int(os.environ["RANK"]), None, 2) if split else slice(None)
    return StatefulLoader([[x[step][share], y[step][share]] for step in range(STEPS)])


def fit(
    parallel: str,
    device: str,
    *,
    folder: Path | None = None,
    resume: Path | None = None,
    also: tuple[Callback, ...] = (),
    precision: str = "32-true",
    compiled: bool = False,
    policy: bool = False,
    double: bool = False,
    model: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train; returns what this rank has in the end, gathered: weights, masks and their hashes at every freeze.

    ``double``: in float64, parameters and batches.
    """
    seed_everything(0, verbose=False)
    if compiled:
        torch._dynamo.reset()
    prox = Prox24(START, FREEZE, verbose=False, **{"skip": ["model.embed", "model.head"], **options})
    record = MaskRecord(prox)
    callbacks = [prox, record, *also]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}"))
    more: dict[str, Any] = {"devices": 2 if parallel else 1}
    if parallel == "ddp":
        more["strategy"] = DDPStrategy(timeout=TIMEOUT)
    elif parallel:
        sizes = (2, 1) if parallel == "fsdp2" else (1, 2)
        more["strategy"] = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False, timeout=TIMEOUT)
    trainer = quiet_trainer(
        accelerator=device,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        precision=precision,
        **more,
    )
    module = ParallelModule(parallel, compiled=compiled, policy=policy, model=None if model is None else model())
    if double:
        module.double()
    batches = loader(parallel in ("ddp", "fsdp2"), dtype=torch.float64 if double else torch.float32)
    log = _Warnings()
    with log.kept(), patch.dict(DEFAULT_STEPS, {"prox": 40}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each device, strategy and precision has advice of its own
        trainer.fit(module, batches, ckpt_path=resume)
    state = {name: gathered(value).cpu().clone() for name, value in module.state_dict().items()}
    parameters = {weight.name: weight.parameter for weight in prox.weights}
    masks = {f"mask of {name}": whole(mask, parameters[name]).cpu() for name, mask in prox.masks.items()}
    return {"weights": state, "masks": masks, "hashes": record.found, "warnings": log.found}


class _Warnings(logging.Handler):
    """Keeps what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    @contextmanager
    def kept(self) -> Iterator[None]:
        logger = logging.getLogger("prox24_lightning")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


def join(device: str) -> None:
    """Enter the process group that all runs of a process share."""
    rank = int(os.environ["RANK"])
    if device == "gpu":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device("cuda", rank))
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


class Cases:
    """Runs named cases one after the other, and keeps what each returned, or the error that it ended with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def run(self, name: str, case: Callable[[], Any]) -> None:
        begin = time.monotonic()
        try:
            self.found[name] = case()
        except Exception:
            self.found[name] = traceback.format_exc()
        print(f"{self.path.stem}: {name or 'progressive'}, {time.monotonic() - begin:.1f} s", flush=True)
        torch.save(self.found, self.path)


def read(path: Path, name: str) -> Any:
    """Return what a case returned; an error that ended it fails the test."""
    found = torch.load(path, weights_only=True)
    assert name in found, f"{name} has not run: the processes ended before"
    assert not isinstance(found[name], str), found[name]
    return found[name]
