"""Prox24(reorder_inputs=True): the order changes as the phase begins, with averages, and only where it may."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prox24_lightning import Prox24, is_24
from prox24_lightning.sparsify.config import SparsifyConfig

START = 3
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))


class Averaging(TinyModule):
    """Keeps an average that holds all weights, or one of them alone."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "model":
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        elif kind == "one weight":
            self.register_buffer("model2weight", self.model[2].weight.detach().clone())

    def on_train_start(self):
        if self.kind == "list":
            self.shadow = [parameter.detach().clone() for parameter in self.model.parameters()]

    def on_train_batch_end(self, *args):
        if self.kind == "model":
            self.ema.update_parameters(self.model)
        elif self.kind == "list":
            for mine, theirs in zip(self.shadow, self.model.parameters(), strict=True):
                mine.lerp_(theirs.detach(), 0.5)
        elif self.kind == "one weight":
            self.model2weight.lerp_(self.model[2].weight.detach(), 0.5)

    def average_output(self):
        copied = copy.deepcopy(self.model)
        if self.kind == "list":
            for parameter, value in zip(copied.parameters(), self.shadow, strict=True):
                parameter.data = value
            return copied(X)
        return self.ema(X)


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def run(kind, *, reorder_inputs, stop=None, **kwargs):
    torch.manual_seed(0)
    module = Averaging(kind)
    prox = Prox24(START, 28, verbose=False, skip=["model.4"], reorder_inputs=reorder_inputs, **kwargs)
    trainer = quiet_trainer(max_steps=32, callbacks=[prox, *([] if stop is None else [StopsAt(stop)])])
    trainer.fit(module, tiny_loader(32))
    return module, prox


def test_the_model_ends_24_in_another_order_and_trains_like_the_other():
    (plain, _), (reordered, prox) = (run("none", reorder_inputs=wanted) for wanted in (False, True))
    assert all(is_24(reordered.model[place].weight) for place in (0, 2))
    assert set(prox.masks) == {"model.0.weight", "model.2.weight"}
    with torch.no_grad():
        dense = TinyModule().model(X)
        assert (plain.model(X) - reordered.model(X)).norm() < 0.5 * (plain.model(X) - dense).norm()


@pytest.mark.filterwarnings("ignore:the run ended at step")
@pytest.mark.parametrize("kind", ["model", "list"])
def test_averages_move_along(kind):
    """Stopped once the order has changed and nothing is pruned yet, everything computes what it would have."""
    (plain, _), (reordered, prox) = (run(kind, reorder_inputs=wanted, stop=START + 3) for wanted in (False, True))
    assert prox.phase == "sparsify"
    assert not prox.masks
    with torch.no_grad():
        assert not torch.allclose(plain.model[2].weight, reordered.model[2].weight)
        torch.testing.assert_close(reordered.model(X), plain.model(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reordered.average_output(), plain.average_output(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the run ended at step")
def test_an_average_of_one_weight_alone_keeps_the_order(caplog):
    with caplog.at_level("INFO"):
        module, _ = run("one weight", reorder_inputs=True, stop=START + 3)
    plain, _ = run("one weight", reorder_inputs=False, stop=START + 3)
    assert torch.equal(module.model[2].weight, plain.model[2].weight)
    assert "is not found in it" in caplog.text


def test_pruning_at_one_step_reorders_first():
    module, prox = run("none", reorder_inputs=True)
    torch.manual_seed(0)
    one = TinyModule()
    trainer = quiet_trainer(max_steps=8, callbacks=[Prox24(4, 4, verbose=False, skip=["model.4"], reorder_inputs=True)])
    trainer.fit(one, tiny_loader(8))
    assert all(is_24(one.model[place].weight) for place in (0, 2))
    assert all(is_24(module.model[place].weight) for place in (0, 2))
    assert prox.phase == "frozen"


def test_layers_that_another_instance_has_pruned_keep_their_order():
    torch.manual_seed(0)
    module = TinyModule()
    first = Prox24(1, 2, verbose=False, targets=["model.0"], name="first", strategy="post_step")
    second = Prox24(START, 28, verbose=False, targets=["model.2"], name="second", reorder_inputs=True)
    quiet_trainer(max_steps=32, callbacks=[first, second]).fit(module, tiny_loader(32))
    assert not module.model[0].weight[~first.masks["model.0.weight"]].any()
    assert is_24(module.model[2].weight)


@pytest.mark.parametrize("settings", [{"strategy": "post_step"}, {"geometry": "column"}])
def test_settings_that_have_no_use_for_it_are_refused(settings):
    with pytest.raises(ValueError, match="reorder_inputs=True needs"):
        SparsifyConfig(reorder_inputs=True, **settings)


def test_the_residual_stream_keeps_its_order_in_training():
    with pytest.raises(ValueError, match="'stream' is for prune_layerwise"):
        SparsifyConfig(reorder_inputs="stream")


def test_a_convolutional_net_moves_its_norms(monkeypatch):
    from tiny_reordered import IMAGES, conv_net

    net, _ = conv_net()

    class Images(TinyModule):
        def __init__(self):
            super().__init__()
            self.model = net

        def training_step(self, batch, batch_idx):
            return self.model(batch[0]).square().mean()

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES.repeat(16, 1, 1, 1)), batch_size=4)
    before = net.project.weight.detach().clone()
    prox = Prox24(1, 4, verbose=False, targets=["model.project", "model.one.second"], reorder_inputs=True)
    module = Images().train()
    quiet_trainer(max_steps=6, callbacks=[prox]).fit(module, data)
    assert is_24(net.project.weight, dim=1)
    assert not torch.allclose(net.project.weight, before)
    assert isinstance(net.norm, nn.BatchNorm2d)
