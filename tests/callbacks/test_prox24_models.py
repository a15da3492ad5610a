"""Models of many kinds go 2:4 by the progressive strategy: lists in lists, experts, in-place code, two optimizers."""

from __future__ import annotations

import enum
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experts import Experts, MixtureModel, expert_weights
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prox24_lightning import Prox24, is_24
from prox24_lightning.sparsify.strategies.progressive.rerun import BlockReruns
from recipes.compiled_blocks import compile_blocks

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, make=Block, count=3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Module(LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def loader(*shape, batches=30):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(4 * batches, *shape, generator=generator)), batch_size=4)


def fit(model, data=None, steps=24, **arguments):
    torch.manual_seed(0)
    prox = Prox24(2, steps - 2, verbose=False, **arguments)
    module = model if isinstance(model, LightningModule) else Module(model)
    quiet_trainer(max_steps=steps, callbacks=[prox]).fit(module, data or loader(6, WIDTH))
    assert prox.phase == "frozen"
    return prox


@pytest.fixture
def found(caplog):
    """Which blocks were reconstructed, and whether anything was left to magnitude."""
    caplog.set_level(logging.INFO, logger="prox24_lightning")

    def read():
        assert "largest weights are kept" not in caplog.text
        return caplog.text.count("after reconstruction")

    return read


class Parts(nn.Module):
    """Blocks as lists of two parts, which the model itself puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(WIDTH, WIDTH), Block()]) for _ in range(3))

    def forward(self, x):
        for mix, block in self.layers:
            x = block(mix(x) + x)
        return x


def test_lists_of_parts_that_are_never_called_are_no_blocks(found):
    fit(Parts())
    assert found() == 0


def test_the_list_of_a_larger_frozen_teacher_is_not_taken_for_the_blocks(found):
    module = Module(Blocks())
    module.teacher = Blocks(count=6).requires_grad_(False)
    fit(module)
    assert found() == 3


def test_a_block_that_stands_in_the_list_three_times_is_one(found):
    shared = Block()
    fit(Blocks(lambda: shared))
    assert found() == 1


class Routed(nn.Module):
    """Each expert gets the tokens that a router sends it, in the dense copy others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        h = self.mix(x)
        shares = self.router(h).softmax(-1)
        chosen, y = shares.argmax(-1), h.clone()
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if here.any():
                weighed = expert(h[here]) * shares[here][:, number : number + 1]
                y = y.index_put(torch.where(here), weighed, accumulate=True)
        return x + y


def test_experts_that_get_other_tokens_in_the_dense_copy():
    fit(Blocks(Routed))


class KeepsLoss(Block):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.auxiliary = y.square().mean()
        return y


def test_an_activation_kept_on_a_module_does_not_stop_the_dense_copy(found):
    fit(Blocks(KeepsLoss))
    assert found() == 3


def test_blocks_that_are_compiled_one_by_one_as_children(found):
    fit(Blocks(lambda: torch.compile(Block(), backend="eager")))
    assert found() == 3


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_buffers_are_not_counted_twice(compiled, monkeypatch):
    """What training compiled serves in training mode, in which blocks count."""
    monkeypatch.setattr("recipes.compiled_blocks.torch.compile", lambda function, **_: function)
    model = Blocks(Counts)
    if compiled:
        assert compile_blocks(model) == 3
    fit(model)
    assert [int(block.seen) for block in model.blocks] == [24, 24, 24]


def test_encoder_layers_of_torch_with_a_padding_mask():
    class Padded(Module):
        def training_step(self, batch, batch_idx):
            padding = torch.zeros(batch[0].shape[:2], dtype=torch.bool)
            padding[1:, 4:] = True
            return self.model(batch[0], src_key_padding_mask=padding)[~padding].square().mean()

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
    before = torch.backends.mha.get_fastpath_enabled()
    fit(Padded(nn.TransformerEncoder(layer, 2)))
    assert torch.backends.mha.get_fastpath_enabled() is before


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def test_sequences_of_varying_length_with_the_channels_first(found):
    data = [(torch.randn(4, WIDTH, 10 + number % 5),) for number in range(30)]
    fit(Blocks(Convolutions), DataLoader(data, batch_size=None))
    assert found() == 3


class ReluInPlace(Block):
    def forward(self, x):
        return F.relu(x, inplace=True) + self.down(torch.relu(self.up(x)))


def test_blocks_that_change_their_input_in_place(found):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Blocks(ReluInPlace)

        def forward(self, x):
            return self.inner(x * 2)

    fit(Doubled())
    assert found() == 3


class Between(nn.Module):
    """Something is added to the hidden state between two blocks: in place, or not."""

    def __init__(self, in_place) -> None:
        super().__init__()
        self.in_place = in_place
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        extra = x * 3
        for block in self.blocks:
            x = block(x)
            x = x.add_(extra) if self.in_place else x + extra
        return x


class Skips(nn.Module):
    """Every block sees what the one before it got, besides what it handed on."""

    class Two(Block):
        def forward(self, x, before):
            return super().forward(x + before), x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Two() for _ in range(4))

    def forward(self, x):
        before = x * 0.5
        for block in self.blocks:
            x, before = block(x, before)
        return x


@pytest.mark.parametrize(
    "make", [lambda: Between(False), lambda: Between(True), Skips], ids=["plain", "place", "skips"]
)
def test_blocks_that_share_a_turn_see_what_the_model_hands_them(make, monkeypatch):
    """Of four blocks at one turn, each is solved on what it sees once those before it are sparse."""
    seen = []
    real = BlockReruns.runs_of

    def runs_of(self, block):
        runs = real(self, block)
        given = []
        handle = block.module.register_forward_pre_hook(lambda module, args: given.append(args))
        runs[0]()
        block.hooked.calls[0](block.hooked.module)
        handle.remove()
        seen.append(all(torch.allclose(a, b, atol=1e-6) for a, b in zip(given[0], given[1], strict=True)))
        return runs

    monkeypatch.setattr(BlockReruns, "runs_of", runs_of)
    torch.manual_seed(0)
    prox = Prox24(20, 20, verbose=False)
    quiet_trainer(max_steps=20, callbacks=[prox]).fit(Module(make()), loader(6, WIDTH))
    assert seen == [True] * 4


def test_parameters_in_no_optimizer_stay_as_they_are():
    class Some(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW((p for name, p in self.named_parameters() if "up.weight" in name), lr=1e-3)

    module = Some(Blocks())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "up.weight" in name}


class TwoPlayers(LightningModule):
    """Each optimizer's turn takes the gradients of the other's parameters away, as Lightning shows it for GANs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Blocks(count=1), Blocks(count=3)
        self.leak = 0.0

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers()[::-1]:
            self.toggle_optimizer(optimizer)
            loss = self.second(self.first(batch[0])).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            for name, mask in self.trainer.callbacks[0].masks.items():
                gradient = self.get_parameter(name).grad
                if gradient is not None:
                    self.leak = max(self.leak, float((gradient * ~mask).abs().max()))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.Adam(self.first.parameters(), 1e-3), torch.optim.Adam(self.second.parameters(), 1e-3)


@pytest.mark.parametrize("arguments", [{}, {"reconstruction_steps": 0}, {"strategy": "post_step"}])
def test_optimizers_that_take_turns_with_the_gradients(arguments):
    module = TwoPlayers()
    prox = Prox24(8, 30, verbose=False, **arguments)
    trainer = quiet_trainer(max_steps=48, callbacks=[prox])
    trainer.fit(module, loader(6, WIDTH, batches=40))
    assert prox.phase == "frozen"
    assert module.leak == 0.0
    assert all(p.requires_grad for p in module.parameters())


class Mode(str, enum.Enum):
    PLAIN = "plain"


class OwnDict(dict):
    pass


@pytest.mark.parametrize("argument", [np.float64(0.5), Mode.PLAIN, OwnDict(scale=1.0)], ids=["numpy", "enum", "dict"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_whose_model_is_called_with_odd_things_resumes(argument, tmp_path):
    class Odd(Module):
        def training_step(self, batch, batch_idx):
            return self.model(batch[0], argument).square().mean()

    class Takes(Blocks):
        def forward(self, x, odd):
            return super().forward(x)

    save = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    callbacks = [Prox24(2, 18, verbose=False), save]
    quiet_trainer(max_steps=20, callbacks=callbacks, enable_checkpointing=True).fit(Odd(Takes()), loader(6, WIDTH))
    again = Prox24(2, 18, verbose=False)
    trainer = quiet_trainer(max_steps=20, callbacks=[again])
    trainer.fit(Odd(Takes()), loader(6, WIDTH), ckpt_path=tmp_path / "step=10.ckpt", weights_only=True)
    assert again.phase == "frozen"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{"reconstruction_steps": 4}, {"calibration": "stream"}, {"strategy": "post_step", "geometry": "block"}],
)
def test_experts_in_one_parameter_go_24(transposed, arguments, caplog):
    model = MixtureModel(1, transposed)
    with caplog.at_level(logging.WARNING):
        prox = fit(model, loader(6, 8, batches=12), steps=12, **arguments)
    assert {f"model.{name}" for name in expert_weights(model)} <= set(prox.masks)
    for weight in prox.weights:
        dims = (weight.dim,) if isinstance(weight.dim, int) else weight.dim
        assert all(is_24(weight.parameter, dim=dim) for dim in dims)
        assert torch.equal(weight.parameter == 0, ~prox.masks[weight.name])
    assert "largest weights are kept" not in caplog.text
    assert "once more" not in caplog.text


class Odd(Experts):
    """An error of its own when it runs without the router's order: as it does when it is run once more."""

    def forward(self, hidden, index, shares):
        if not torch.is_grad_enabled():
            raise RuntimeError("not now")
        return super().forward(hidden, index, shares)


def test_experts_that_refuse_to_run_once_more_go_24_by_magnitude(caplog):
    model = MixtureModel(1)
    model.blocks[0].experts.__class__ = Odd
    fit(model, loader(6, 8), strategy="post_step")
    assert all(is_24(parameter, dim=2) for parameter in expert_weights(model).values())
    assert "cannot be run once more: its experts are pruned by magnitude" in caplog.text
