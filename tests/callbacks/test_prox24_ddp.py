"""Two ranks of DDP on the CPU: the same masks and weights on both, though each sees other inputs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import Prox24
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.slow


class SaveRank(Callback):
    """Writes what each rank ended with: with spawned processes nothing else comes back."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        prox = trainer.callbacks[0]
        state = {
            "masks": prox.masks,
            "scales": {weight.name: prox.metric_scale(weight.name) for weight in prox.weights},
            "weights": {weight.name: weight.parameter.detach().clone() for weight in prox.weights},
            "inputs": self.inputs,
        }
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs = batch[0]


@pytest.mark.parametrize("strategy", ["post_step", "progressive"])
def test_ranks_agree(tmp_path, strategy):
    prox = Prox24(1, 5, strategy=strategy, targets=["model.0", "model.2"], verbose=False)
    trainer = quiet_trainer(max_steps=8, devices=2, strategy="ddp_spawn", callbacks=[prox, SaveRank(tmp_path)])
    trainer.fit(TinyModule(), tiny_loader(batches=16))
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
