"""``Prox24(geometry="block", sparse_training=True)``: which layers are set up, when, and that nothing stays behind.

What they compute on a GPU is tested in tests/convert/test_transposable_linear_gpu.py; here they multiply densely.
"""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24
from prox24_lightning.convert.layers.transposable_linear import TransposableForward


class Look(Callback):
    def __init__(self) -> None:
        self.layers: list[set[str]] = []
        self.copy_is_its_own = False
        self.left_at_the_end: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        found = {name: vars(module).get("forward") for name, module in pl_module.named_modules()}
        found = {name: forward for name, forward in found.items() if isinstance(forward, TransposableForward)}
        self.layers.append(set(found))
        if found:
            twin = copy.deepcopy(pl_module.model)
            self.copy_is_its_own = all(
                vars(layer)["forward"].linear is layer for layer in twin if "forward" in vars(layer)
            )

    def on_fit_end(self, trainer, pl_module):
        self.left_at_the_end = [name for name, module in pl_module.named_modules() if "forward" in vars(module)]


def run(**arguments):
    torch.manual_seed(0)
    module, look = TinyModule(width=64), Look()
    callbacks = [Prox24(2, 6, geometry="block", verbose=False, **arguments), look]
    quiet_trainer(max_steps=9, callbacks=callbacks).fit(module, tiny_loader(batches=9))
    return module, look


@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_layers_are_set_up_once_frozen_and_given_back_at_the_end(strategy):
    module, look = run(strategy=strategy, sparse_training=True)
    # The first layer has 8 inputs and the last 4 outputs: neither divides by 64.
    assert look.layers[0] == set()
    assert look.layers[-1] == {"model.2"}
    assert look.copy_is_its_own
    assert look.left_at_the_end == [], "what is converted or exported in on_fit_end is a plain layer"
    assert all("forward" not in vars(layer) for layer in module.modules())
    plain, _ = run(strategy=strategy)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_geometries_are_refused():
    with pytest.raises(ValueError, match="sparse_training=True needs geometry='block', not 'row'"):
        Prox24(sparse_training=True)
