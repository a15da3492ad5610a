"""Processes of a gloo group that train the tiny model sharded, for the tests; importable by spawned processes."""

from __future__ import annotations

import os
from pathlib import Path

from few_steps import few_solver_steps
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from prox24_lightning import Prox24
from prox24_lightning.weights.sharded import gathered

STEPS, START, FREEZE = 12, 2, 8


class ShardedModule(TinyModule):
    """Sharded by FSDP2 (``"fsdp2"``) or by tensor parallelism (``"tensor"``); ``""`` leaves it whole."""

    def __init__(self, sharding: str) -> None:
        super().__init__()
        self.sharding = sharding

    def configure_model(self):
        if self.sharding == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.model[0], self.model[2], self.model[4]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if self.sharding == "tensor":
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(self.model, self.device_mesh["tensor_parallel"], plan)


def loader(split: bool) -> StatefulLoader:
    """Eight samples a step: all of them, or this rank's four."""
    rank = int(os.environ["RANK"]) if split else 0
    return StatefulLoader([[part[rank::2] for part in batch] if split else batch for batch in tiny_loader(STEPS, 8)])


def fit(
    sharding: str,
    strategy: str,
    folder: Path | None = None,
    full: bool = True,
    resume: Path | None = None,
    also=(),
    budget: float = 0.0,
    **more,
):
    """Train; returns trainer, module and what all ranks have in the end, gathered."""
    seed_everything(0, verbose=False)
    options = {"budget": budget} if strategy == "progressive" else {"strategy": "post_step", "metric": "activation"}
    prox = Prox24(START, FREEZE, targets=["model.0", "model.2"], verbose=False, **options)
    callbacks = [prox, *also]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    if sharding:
        sizes = (2, 1) if sharding == "fsdp2" else (1, 2)
        more |= {"strategy": ModelParallelStrategy(*sizes, save_distributed_checkpoint=not full), "devices": 2}
    trainer = quiet_trainer(
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        **more,
    )
    module = ShardedModule(sharding)
    with few_solver_steps():
        trainer.fit(module, loader(sharding == "fsdp2"), ckpt_path=resume)
    state = {name: gathered(value).clone() for name, value in module.state_dict().items()}
    masks = prox.state_dict()["masks"]
    state |= {f"mask of {name}": mask["bits"] for name, mask in masks.items()}
    return trainer, module, state
