"""Short runs with every setting of Prox24, and the comparison of two of them bit for bit."""

from __future__ import annotations

import torch
from few_steps import few_solver_steps
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import StatefulLoader, TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24

START, FREEZE, STEPS = 8, 24, 32


SETTINGS = {
    "progressive": {},
    "progressive_reordered": {"reorder_inputs": True},
    "activation": {"strategy": "post_step"},
    "weight": {"strategy": "post_step", "metric": "weight"},
    "relative": {"strategy": "post_step", "schedule": "exponential"},
    "restore": {"strategy": "post_step", "refit": "restore"},
    "block": {"strategy": "post_step", "geometry": "block"},
    "progressive_block": {"geometry": "block"},
}


def callbacks(setting, folder):
    return [
        Prox24(START, FREEZE, verbose=False, targets=["model.0", "model.2"], **SETTINGS[setting]),
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
    ]


def run(setting, folder, steps=STEPS, resume=None, more=()):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks(setting, folder), *more], enable_checkpointing=True
    )
    module = TinyModule()
    with few_solver_steps():  # in a new process as well
        trainer.fit(module, StatefulLoader(tiny_loader(STEPS)), ckpt_path=resume)
    return trainer, module


def run_and_save(setting, folder, resume, target):
    """Write :func:`everything` of a run to the file ``target``."""
    torch.save(everything(*run(setting, folder, resume=resume)), target)


def everything(trainer, module):
    """Weights, optimizer state, and all that the callback keeps, in one flat dict."""
    state = {f"weight {name}": value for name, value in module.state_dict().items()}
    for index, entry in trainer.optimizers[0].state_dict()["state"].items():
        state.update({f"optimizer {index} {key}": torch.as_tensor(value) for key, value in entry.items()})
    return {**state, **flat(trainer.callbacks[0].state_dict(), "prox")}


def flat(value, path):
    """Every leaf of nested dicts under its path: tensors as they are, the rest as text."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{path}/{key}").items()}
    return {path: value if torch.is_tensor(value) else torch.tensor(list(repr(value).encode()))}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
