"""Two ranks of DDP on the CPU: the same masks and weights on both, though each sees other inputs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from new_processes import spawn
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, RoundWeights
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.slow


class NoteInputs(Callback):
    """Keeps the inputs of the last step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs = batch[0]


def work(rank, strategy, folder):
    prox, note = Prox24(1, 5, strategy=strategy, targets=["model.0", "model.2"], verbose=False), NoteInputs()
    callbacks = [prox, note, *([RoundWeights(verbose=False)] if strategy == "post_step" else [])]
    quiet_trainer(max_steps=8, devices=2, strategy="ddp", callbacks=callbacks).fit(
        TinyModule(), tiny_loader(batches=16)
    )
    state = {
        "masks": prox.masks,
        "scales": {weight.name: prox.controller.metric_scale(weight.name) for weight in prox.weights},
        "weights": {weight.name: weight.parameter.detach().clone() for weight in prox.weights},
        "inputs": note.inputs,
    }
    torch.save(state, folder / f"rank{rank}.pt")


@pytest.mark.parametrize("strategy", ["post_step", "progressive"])
def test_ranks_agree(tmp_path, strategy):
    spawn(work, strategy, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(first["inputs"], second["inputs"]), "the ranks must see different data for this to mean much"
    for part in ("masks", "scales", "weights"):
        assert set(first[part]) == {"model.0.weight", "model.2.weight"}
        for name, value in first[part].items():
            if part == "scales" and strategy == "progressive":
                assert value is None, "the progressive strategy solves these layers and needs no metric"
                continue
            assert torch.equal(value, second[part][name]), f"{part} of {name} differ"
    assert all(is_24(weight) for weight in first["weights"].values())
