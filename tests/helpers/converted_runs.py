"""Short runs that end with ConvertAndBenchmark."""

from __future__ import annotations

from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import ConvertAndBenchmark, Prox24

HIDDEN = "model.2"


def prox(**arguments) -> Prox24:
    return Prox24(**{"start": 0, "freeze": 3, "targets": [f"{HIDDEN}.weight"], "verbose": False, **arguments})


def fit(tmp_path, *callbacks, module=None, steps=6, **arguments):
    final = ConvertAndBenchmark(verbose=False)
    module = TinyModule() if module is None else module
    trainer = quiet_trainer(max_steps=steps, callbacks=[*callbacks, final], default_root_dir=tmp_path, **arguments)
    trainer.fit(module, tiny_loader())
    return final, module, trainer


def states(report) -> dict[str, tuple[str, str]]:
    return {layer.name: (layer.state, layer.why) for layer in report.layers}
