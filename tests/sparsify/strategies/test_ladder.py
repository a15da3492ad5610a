"""Which way calibration takes for which forward, that no run dies of it, and that the user's module stays as it was."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prox24_lightning.mask import is_24
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.weights.selection import select_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def body(self, x):
        return self.third(self.second(self.first(x).tanh()).tanh())

    def forward(self, x):
        return self.body(x)


class Differentiates(Net):
    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.body(x).sum(), x, create_graph=True)[0]


class HooksActivation(Net):
    def forward(self, x):
        hidden = self.second(self.first(x).tanh())
        hidden.register_hook(lambda gradient: gradient * 0.5)
        return self.third(hidden.tanh())


@dataclass
class Batch:
    x: torch.Tensor


class WritesIntoBatch(Net):
    def forward(self, batch):
        batch.x = self.first(batch.x).tanh()
        batch.x = self.second(batch.x).tanh()
        return self.third(batch.x)


class TrainingOnly(Net):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("for training only")
        return self.body(x)


class SparseArgument(Net):
    def forward(self, adjacency, x):
        return self.body(torch.sparse.mm(adjacency, x))


class TakesGenerator(Net):
    def forward(self, rows):
        return self.body(torch.stack(list(rows)))


class TakesRandomGenerator(Net):
    def forward(self, x, generator):
        return self.body(x + 0.1 * torch.randn(x.shape, generator=generator))


class Noisy(Net):
    def forward(self, x):
        numbers = torch.tensor(np.random.randn(*x.shape), dtype=x.dtype)
        return self.body(x + 0.1 * (torch.randn_like(x) + numbers + random.random()))


class Scaled(Net):
    """Uses what the training step sets on it."""

    def forward(self, x):
        return self.body(x * self.scale)


class Remembers(Net):
    memory = 0.0

    def forward(self, x):
        hidden = self.first(x).tanh() + self.memory
        self.memory = hidden.detach()
        return self.third(self.second(hidden).tanh())


class Once(Net):
    """Refuses to be called more often than training does."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if not torch.is_grad_enabled():
            raise RuntimeError("called by nobody I know")
        if self.calls > self.allowed:
            raise RuntimeError("called too often")
        return self.body(x)


class WritesToParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.codes.lerp_(x.mean(0), 0.1)
        return self.body(x - self.codes)


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, x):
        return self.third(self.dropout(self.norm(self.second(self.first(x).tanh()))))


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log = 0, []

    def forward(self, x):
        self.seen += len(x)
        self.calls += 1
        self.log.append(len(x))
        return self.body(x)


def plain(model, x, step):
    return model(x)


def scaled(model, x, step):
    model.scale = 1.0 + torch.rand(len(x), 1, generator=torch.Generator().manual_seed(step))
    return model(x)


def scaled_and_gone(model, x, step):
    y = scaled(model, x, step)
    del model.scale
    return y


def allowed_once(model, x, step):
    model.calls, model.allowed = 0, 1
    return model(x)


CASES = {
    "plain": (Net, plain, "rerun"),
    "differentiates": (Differentiates, plain, "rerun"),
    "hooks an activation": (HooksActivation, plain, "rerun"),
    "writes into its batch": (WritesIntoBatch, lambda model, x, step: model(Batch(x)), "rerun"),
    "raises in evaluation mode": (TrainingOnly, plain, "rerun"),
    "sparse": (SparseArgument, lambda model, x, step: model(torch.eye(len(x)).to_sparse(), x), "rerun"),
    "sparse rows": (SparseArgument, lambda model, x, step: model(torch.eye(len(x)).to_sparse_csr(), x), "rerun"),
    "a generator": (TakesGenerator, lambda model, x, step: model(row for row in x), "stream"),
    "a random generator": (
        TakesRandomGenerator,
        lambda model, x, step: model(x, torch.Generator().manual_seed(step)),
        "rerun",
    ),
    "random numbers": (Noisy, plain, "rerun"),
    "set by the training step": (Scaled, scaled, "stream"),
    "set and taken away": (Scaled, scaled_and_gone, "stream"),
    "remembers": (Remembers, plain, "stream"),
    "refuses": (Once, allowed_once, "stream"),
    "writes to a parameter": (WritesToParameter, plain, "stream"),
    "batch norm and dropout": (Normalised, plain, "rerun"),
    "counts": (Counts, plain, "rerun"),
}


def weights_of(model):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return select_weights(model, targets=[f"{name}.weight" for name in names]).chosen


PLAN = PhasePlan(3, 20)


def run(model, step_of, *, plan=PLAN, steps=22, batches=4, **options):
    torch.manual_seed(0)
    strategy = Progressive(model, batches=batches, prox_steps=5, reconstruction_steps=8, **options)
    engine = SparsityEngine(weights_of(model), plan, strategy)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(1)
    engine.bind([optimizer])
    for step in range(steps):
        engine.before_batch()
        optimizer.zero_grad()
        step_of(model, torch.randn(16, 8, generator=generator), step).square().mean().backward()
        optimizer.step()
        engine.after_batch()
    engine.unbind()
    return engine


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("case", CASES)
def test_every_forward_ends_2_4_by_the_first_way_that_works(case, caplog):
    make, step_of, way = CASES[case]
    model = make()
    engine = run(model, step_of)
    assert engine.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in engine.weights)
    assert engine.strategy.state_dict()["way"] == way
    warned = [record.getMessage() for record in caplog.records if "not run again" in record.getMessage()]
    assert len(warned) == (way == "stream")
    assert "largest weights are kept" not in caplog.text, "nothing was left to magnitude"
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_reruns_leave_buffers_attributes_and_random_state_alone():
    with_prox, without = Counts(), Counts()
    run(with_prox, plain)
    after = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(22):
        without(torch.zeros(16, 8))
    assert torch.equal(with_prox.seen, without.seen)
    assert (with_prox.calls, with_prox.log) == (without.calls, without.log)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_noise_drawn_in_forward_is_the_same_for_the_dense_reference():
    """As if it had been drawn outside, and given as an argument."""

    class Inside(Net):
        def forward(self, x, noise=None):
            return self.body(x + (torch.randn_like(x) if noise is None else noise))

    torch.manual_seed(0)
    inside, outside = Inside(), Inside()
    outside.load_state_dict(inside.state_dict())
    run(inside, plain, dense_target=1.0)
    run(outside, lambda model, x, step: model(x, torch.randn_like(x)), dense_target=1.0)
    for one, other in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", ["plain", "set by the training step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupt_while_blocks_are_solved_leaves_the_phase_as_it_was(case, error, monkeypatch):
    make, step_of, _ = CASES[case]
    model = make()
    from prox24_lightning.solvers.input_group import solve_input_group
    from prox24_lightning.sparsify.strategies.progressive import solve_block, stream_calibration

    solved, before = [], {}

    def interrupted(weights, *args, **options):
        found = solve_input_group(weights, *args, **options)
        solved.append(weights)
        if len(solved) == 2:
            raise error
        return found

    for module in (solve_block, stream_calibration):
        monkeypatch.setattr(module, "solve_input_group", interrupted)

    def remembering(model, x, step):
        before.update({name: value.detach().clone() for name, value in model.named_parameters()})
        return step_of(model, x, step)

    with pytest.raises(error):
        run(model, remembering, plan=PhasePlan(9, 9), steps=10)
    assert len(solved) == 2, "in the middle"
    for name, value in model.named_parameters():
        assert not is_24(value) or value.dim() < 2, f"{name} is as the step has left it"
        assert (value - before[name]).abs().max() < 0.1


def test_a_forward_that_refuses_later_streams_from_then_on(caplog):
    class Later(Net):
        step = 0

        def forward(self, x):
            if self.step >= 8 and not torch.is_grad_enabled():
                raise RuntimeError("no more")
            return self.body(x)

    def step_of(model, x, step):
        Later.step = step
        return model(x)

    engine = run(Later(), step_of)
    assert engine.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in engine.weights)
    assert "the model failed when it was called again (RuntimeError: no more)" in caplog.text


@pytest.mark.parametrize("freeze", [1, 2])
def test_a_run_too_short_to_stream_keeps_the_largest_weights(freeze, caplog):
    engine = run(Scaled(), scaled, plan=PhasePlan(0, freeze), steps=3)
    assert engine.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in engine.weights)


def test_streamed_layers_are_solved_on_what_they_see_in_training():
    """With one layer, and weights that do not move, on the very Hessian."""
    from prox24_lightning.solvers import solve_layer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    strategy = Progressive(model, calibration="stream", batches=3)
    engine = SparsityEngine(weights_of(model), PhasePlan(4, 8), strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dense, batches = model[0].weight.detach().clone(), [torch.randn(64, 16) @ torch.randn(16, 16) for _ in range(8)]
    batches[6][3, 3] = torch.nan  # a gradient scaler skips such a step
    engine.bind([optimizer])
    for x in batches:
        engine.before_batch()
        if (loss := model(x).sum()).isfinite():
            loss.backward()
        optimizer.step()
        engine.after_batch()
    seen = torch.cat([batches[5], batches[7]])
    expected = solve_layer(dense, seen.T @ seen / len(seen))
    assert torch.equal(engine.masks["0.weight"], expected.mask)
    torch.testing.assert_close(model[0].weight.detach(), expected.weight, rtol=1e-4, atol=1e-4)


def test_streaming_goes_input_group_after_input_group_in_the_order_of_the_forward():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.up, self.gate = nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x):
            return self.last(self.gate(x).tanh() * self.up(x))

    engine = run(Backwards(), plain, calibration="stream")
    assert list(engine.masks) == ["gate.weight", "up.weight", "last.weight"]


def test_unknown_calibration_is_refused():
    with pytest.raises(ValueError, match="calibration='rerun' is unknown; use one of auto, stream, magnitude"):
        Progressive(Net(), calibration="rerun")


class Checkpointed(nn.Module):
    """Its training step calls the blocks one by one, with activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3))


@pytest.mark.parametrize("calibration", ["auto", "stream"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_under_checkpointing_are_solved_in_the_order_of_the_forward_pass(reentrant, calibration, caplog):
    def step_of(model, x, step):
        x.requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    engine = run(Checkpointed(), step_of, root_is_called=False, calibration=calibration)
    assert list(engine.masks) == [f"blocks.{block}.{layer}.weight" for block in range(3) for layer in (0, 2)]
    assert "largest weights are kept" not in caplog.text


@pytest.mark.parametrize("calibration", ["auto", "stream"])
def test_a_call_that_checkpointing_repeats_counts_once(calibration):
    model, other = Checkpointed(), Checkpointed()
    other.load_state_dict(model.state_dict())

    def plainly(model, x, step):
        for block in model.blocks:
            x = block(x)
        return x

    def checkpointed(model, x, step):
        x.requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    run(model, plainly, root_is_called=False, calibration=calibration)
    run(other, checkpointed, root_is_called=False, calibration=calibration)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class Towers(nn.Module):
    """Runs one tower in even batches, the other in odd ones; registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.ModuleDict({"b": nn.Linear(8, 8), "a": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x, which):
        return self.towers[which]["b"](self.towers[which]["a"](x).tanh())


@pytest.mark.parametrize("calibration", ["auto", "stream"])
def test_two_towers_in_turns_each_in_its_own_order(calibration, caplog):
    engine = run(
        Towers(), lambda model, x, step: model(x, step % 2), plan=PhasePlan(3, 36), steps=37, calibration=calibration
    )
    order = [name.removesuffix(".weight").removeprefix("towers.") for name in engine.masks]
    assert order.index("0.a") < order.index("0.b")
    assert order.index("1.a") < order.index("1.b")
    assert "largest weights are kept" not in caplog.text


class Skipping(nn.Module):
    """Leaves blocks out in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, depth):
        for block in self.blocks[:depth]:
            x = block(x).tanh()
        return x


def test_blocks_that_some_batches_leave_out(caplog):
    engine = run(Skipping(), lambda model, x, step: model(x, 4 - step % 3), plan=PhasePlan(16, 16), steps=17, batches=8)
    assert len(engine.masks) == 4
    assert "largest weights are kept" not in caplog.text


def test_a_model_whose_copy_computes_something_else_has_no_dense_reference(caplog):
    class Registered(Net):
        known: ClassVar[dict] = {}

        def __init__(self) -> None:
            super().__init__()
            self.known[id(self)] = True

        def forward(self, x):
            return self.body(x) if self.known.get(id(self)) else torch.zeros(len(x), 8)

    engine = run(Registered(), plain)
    assert engine.phase == "frozen"
    assert "dense_target=0.5 has no effect" in caplog.text


def test_a_model_that_cannot_be_copied_has_no_dense_reference(caplog):
    model = Net()
    model.lock = threading.Lock()
    engine = run(model, plain)
    assert engine.phase == "frozen"
    assert all(is_24(weight.parameter) for weight in engine.weights)
    assert "dense_target=0.5 has no effect" in caplog.text


def test_streaming_sees_layers_inside_compiled_blocks(caplog):
    """Hooks that were not there when the blocks were compiled."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
            for block in self.blocks:
                block.forward = torch.compile(block.forward, backend="eager")

        def forward(self, x):
            for block in self.blocks:
                x = block(x * self.scale)
            return x

    torch._dynamo.reset()
    engine = run(Blocks(), scaled)
    assert engine.strategy.state_dict()["way"] == "stream"
    assert list(engine.masks) == ["blocks.0.0.weight", "blocks.1.0.weight"]
    assert "largest weights are kept" not in caplog.text


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("plain", [False, False, False]),
        ("batch norm and dropout", [False, False, False]),
        ("differentiates", [True, False, False]),
        ("random numbers", [False, False, True]),
    ],
)
def test_gradients_hooks_and_random_states_are_kept_only_where_they_are_needed(case, settings):
    make, step_of, _ = CASES[case]
    engine = run(make(), step_of, plan=PhasePlan(40, 50), steps=2)
    assert engine.strategy.state_dict()["calibration"]["calls"][0][0]["settings"] == settings


class NoisyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, noise=None):
        noise = torch.randn_like(x) if noise is None else noise
        return x + self.down(self.up(x + noise).tanh())


class NoisyBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NoisyBlock() for _ in range(3))

    def forward(self, x, noises=(None, None, None)):
        for block, noise in zip(self.blocks, noises, strict=True):
            x = block(x, noise)
        return x


def test_noise_drawn_in_blocks_is_the_same_in_every_rerun():
    torch.manual_seed(0)
    inside, outside = NoisyBlocks(), NoisyBlocks()
    outside.load_state_dict(inside.state_dict())
    plan = PhasePlan(6, 6)
    run(inside, plain, plan=plan, steps=6, dense_target=1.0)
    run(
        outside,
        lambda model, x, step: model(x, [torch.randn_like(x) for _ in range(3)]),
        plan=plan,
        steps=6,
        dense_target=1.0,
    )
    for one, other in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(one, other)
