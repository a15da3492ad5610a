"""The peers do what their papers say, and end 2:4."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import SRSTE, GradualMagnitude, OneShot, ProxSparse, proxsparse
from benchmarks.peers.flat_groups import FlatGroups
from benchmarks.peers.gradual_magnitude import partial_mask
from prox24_lightning import Prox24
from prox24_lightning.mask import is_24, mask_24, zeros_per_group
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.weights.selection import select_weights

STEPS = 12


class Regression(LightningModule):
    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("all_24", float(all(is_24(weight) for weight in weights(self))))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def weights(module):
    return [module.model[0].weight, module.model[2].weight]


def loader(count=STEPS):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4 * count, 8, generator=draw)
    return DataLoader(TensorDataset(x, torch.tanh(x[:, :4])), batch_size=4)


def fit(*callbacks, module=None, loaders=None, **options):
    module = module or Regression()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    arguments = {
        "check_val_every_n_epoch": None,
        "max_steps": STEPS,
        "num_sanity_val_steps": 0,
        "val_check_interval": 3,
        **dict.fromkeys(quiet, False),
        **options,
    }
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **arguments)
    trainer.fit(module, loaders or loader(), loader(1))
    return module


class Watch(Callback):
    """Keeps copies of the weights as each batch ends."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append([weight.detach().clone() for weight in weights(pl_module)])


PEERS = {
    "sr-ste": lambda: [SRSTE()],
    "gradual": lambda: [GradualMagnitude()],
    "proxsparse": lambda: [ProxSparse()],
    "one-shot": lambda: [
        OneShot([torch.randn(32, 8)], method="sparsegpt"),
        Prox24(start=0, freeze=0, strategy="post_step", metric="weight", verbose=False),
    ],
}


@pytest.mark.parametrize("peer", list(PEERS))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_peer_ends_2_4_and_has_trained(peer, accumulate):
    before = weights(Regression())
    module = fit(*PEERS[peer](), loaders=loader(accumulate * STEPS), accumulate_grad_batches=accumulate)
    assert all(is_24(weight) for weight in weights(module))
    kept = [weight != 0 for weight in weights(module)]
    assert all((w[k] != b[k]).all() for w, b, k in zip(weights(module), before, kept, strict=True))


def test_groups_of_linear_layers_and_convolutions_come_back_as_they_were():
    model = nn.Sequential(nn.Conv2d(8, 3, 3), nn.Linear(12, 5))
    chosen = select_weights(model).chosen
    tensors = [weight.parameter.detach() for weight in chosen]
    flat = FlatGroups(chosen)
    groups = flat.gather(tensors)
    assert groups.shape == (8 * 3 * 9 // 4 + 15, 4)
    assert torch.equal(groups[1], tensors[0][0, 4:8, 0, 0])
    assert all(map(torch.equal, flat.scatter(groups), tensors))


def test_sr_ste_is_the_paper_s_update():
    decay, module = 0.05, Regression("sgd")
    dense = [parameter.detach().clone().requires_grad_() for parameter in module.model.parameters()]
    for x, y in loader():
        masks = [mask_24(p) if p.dim() == 2 else torch.ones_like(p, dtype=torch.bool) for p in dense]
        w1, b1, w2, b2 = (p.detach().mul(m).requires_grad_() for p, m in zip(dense, masks, strict=True))
        loss = nn.functional.mse_loss(torch.tanh(x @ w1.T + b1) @ w2.T + b2, y)
        gradients = torch.autograd.grad(loss, (w1, b1, w2, b2))
        with torch.no_grad():
            for p, mask, gradient in zip(dense, masks, gradients, strict=True):
                p -= 0.1 * (gradient + decay * p * ~mask)
    fit(SRSTE(decay), module=module)
    for found, expected in zip(module.model.parameters(), dense, strict=True):
        mask = mask_24(expected) if expected.dim() == 2 else 1
        torch.testing.assert_close(found, expected * mask, rtol=1e-5, atol=1e-7)


def test_sr_ste_trains_dense_weights_and_validates_masked_ones():
    watch, scored, after = Watch(), [], []

    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            scored.append(trainer.callback_metrics["all_24"].item())

        def on_validation_end(self, trainer, pl_module):
            after.append(any(is_24(weight) for weight in weights(pl_module)))

    interrupted = fit(SRSTE(), watch, Score())
    assert scored == [1.0] * 4
    assert after == [False] * 4
    assert not any(is_24(weight) for seen in watch.seen for weight in seen)
    assert all(map(torch.equal, weights(interrupted), weights(fit(SRSTE(), val_check_interval=STEPS + 1))))


def test_sr_ste_keeps_one_mask_over_the_batches_of_one_step():
    halves = fit(SRSTE(), module=Regression("sgd"), loaders=loader(2 * STEPS), accumulate_grad_batches=2)
    whole = DataLoader(loader(2 * STEPS).dataset, batch_size=8)
    for one, two in zip(weights(halves), weights(fit(SRSTE(), module=Regression("sgd"), loaders=whole)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_partial_mask_takes_the_groups_that_lose_least():
    weight = torch.tensor([[4.0, 3.0, 2.0, 2.0], [4.0, 3.0, 0.1, 0.1], [1.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0]])
    assert partial_mask(weight, 0.0).all()
    half = partial_mask(weight, 0.5)
    assert half.sum(1).tolist() == [4, 2, 4, 2]
    assert half[1].tolist() == [True, True, False, False]
    assert partial_mask(weight, 1.0).sum(1).tolist() == [2, 2, 2, 2]


def test_gradual_magnitude_follows_the_cubic_and_never_brings_a_weight_back():
    watch = Watch()
    fit(GradualMagnitude(start=2, freeze=10, every=2), watch)
    shares = [float((zeros_per_group(seen[0]) >= 2).float().mean()) for seen in watch.seen]
    cubic = [1 - (1 - done / 8) ** 3 for done in (2, 4, 6, 8)]
    steps = [0.0] * 3 + [cubic[0]] * 2 + [cubic[1]] * 2 + [cubic[2]] * 2 + [1.0] * 3
    assert shares == pytest.approx(steps, abs=0.5 / 32)
    for earlier, later in itertools.pairwise(watch.seen):
        assert not later[0][earlier[0] == 0].any()


def test_proxsparse_puts_the_original_weights_under_the_mask_of_the_prox(monkeypatch):
    watch, strengths, before = Watch(), [], weights(Regression())
    true = proxsparse.prox_24

    def prox_24(weight, strength):
        strengths.append(strength)
        return true(weight, strength)

    monkeypatch.setattr(proxsparse, "prox_24", prox_24)
    fit(ProxSparse(freeze=6, strength=2.0), watch)
    assert strengths == [2.0] * 6
    pushed, frozen = watch.seen[4], watch.seen[5]
    assert (zeros_per_group(pushed[0]) >= 2).float().mean() > 0.3
    for weight, original in zip(frozen, before, strict=True):
        assert is_24(weight)
        assert torch.equal(weight[weight != 0], original[weight != 0])
    assert any(not torch.equal(weight != 0, mask_24(original)) for weight, original in zip(frozen, before, strict=True))


def test_one_shot_prunes_before_the_first_step_and_the_mask_stays():
    watch, batches = Watch(), [torch.randn(64, 8)]
    shot = OneShot(batches, method="sparsegpt", refine=None, dense_target=0.0)
    fit(shot, Prox24(start=0, freeze=0, strategy="post_step", metric="weight", verbose=False), watch)
    alone = Regression()
    prune_layerwise(alone.model, batches, method="sparsegpt", refine=None, dense_target=0.0, progress=False)
    expected = [weight != 0 for weight in weights(alone)]
    assert not all(map(torch.equal, expected, map(mask_24, weights(Regression()))))
    for seen in (watch.seen[0], watch.seen[-1]):
        assert all(torch.equal(weight != 0, mask) for weight, mask in zip(seen, expected, strict=True))
    assert shot.seconds > 0


def test_a_model_without_such_weights_is_refused():
    module = Regression()
    module.model = nn.Sequential(nn.Linear(8, 4).requires_grad_(False), nn.Tanh(), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="Regression has no weight that could be 2:4"):
        fit(SRSTE(), module=module)
