"""Prox24 in every geometry: both strategies end 2:4 along every dimension that the geometry asks for, watched on the
way."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, SparsityMonitor
from prox24_lightning.mask import is_24

GEOMETRIES = {"row": -1, "column": 0, "block": (0, 1)}


def run(geometry, strategy):
    torch.manual_seed(0)
    module = TinyModule()
    callback = Prox24(2, 9, geometry=geometry, strategy=strategy, verbose=False)
    monitor = SparsityMonitor(1, summary=False, overview=False, progress_bar=False)
    quiet_trainer(max_steps=12, callbacks=[callback, monitor]).fit(module, tiny_loader(batches=12))
    return module, callback, monitor


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_weights_end_24_along_every_dimension_of_the_geometry(geometry, strategy):
    module, callback, monitor = run(geometry, strategy)
    assert [weight.name for weight in callback.weights] == ["model.0.weight", "model.2.weight", "model.4.weight"]
    for weight in callback.weights:
        assert weight.dim == GEOMETRIES[geometry] if geometry != "row" else weight.dim == 1
        assert is_24(weight.parameter, dim=GEOMETRIES[geometry])
        assert callback.masks[weight.name].float().mean() == 0.5
    history = monitor.histories["prox24"]
    assert history.groups_24[-1] == 1.0
    assert history.groups_24[0] < 0.5
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
