"""Short runs with a SparsityMonitor, and the rows of its CSV log."""

from __future__ import annotations

import csv

from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, SparsityMonitor

LAYERS = ["model.0.weight", "model.2.weight", "model.4.weight"]


def prox(start=4, freeze=12, **arguments):
    return Prox24(start, freeze, **{"strategy": "post_step", "verbose": False, **arguments})


def monitor(every=5, **arguments):
    return SparsityMonitor(every, **{"summary": False, "overview": False, **arguments})


def fit(callbacks, module=None, steps=20, batches=20, resume=None, **arguments):
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks, **arguments)
    module = module or TinyModule()
    trainer.fit(module, tiny_loader(batches), ckpt_path=resume)
    return trainer, module


def rows_of(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}
