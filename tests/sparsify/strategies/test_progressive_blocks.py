"""Models with blocks: what the progressive strategy makes of them, beside the one-shot walk over the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.calibration.statistics.output_error import relative_error
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.solvers.input_group import input_group_hessian
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.sparsify.strategies.progressive import dense_block, solve_block
from prox24_lightning.weights.selection import select_weights

STEPS = 5
"""Proximal steps a layer: enough to tell one solution from another."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, shift=None):
        return x + self.dropout(self.down(torch.tanh(self.gate(x)) * self.up(x))) + shift


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, shift=0.1)
        return self.out(x)


class Parts(nn.Module):
    """Like a LightningModule: what is called are its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Blocks(), nn.Linear(4, 8)

    def training_step(self, x):
        return self.second(self.first(x))


class Unwrapped(nn.Module):
    """Calls the inside of its only part, never the part itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Blocks()

    def training_step(self, x):
        x = self.inner.embed(x)
        for block in self.inner.blocks:
            x = block(x, shift=0.1)
        return self.inner.out(x)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 8, generator=generator) for _ in range(count)]


def engine_for(model, plan, *, targets=None, skip=("embed", "out"), **options):
    weights = select_weights(model, targets=targets, skip=skip).chosen
    return SparsityEngine(weights, plan, Progressive(model, prox_steps=STEPS, **options))


def train(model, engine, data, *, call=None, lr=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    engine.bind([optimizer])
    seen = []
    for x in data:
        engine.before_batch()
        optimizer.zero_grad()
        (call or model)(x).square().mean().backward()
        optimizer.step()
        seen.append(set(engine.masks))
    engine.unbind()
    return seen


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
@pytest.mark.parametrize("plan", [PhasePlan(4, 4), PhasePlan(1, 4)], ids=["at once", "along the run"])
def test_without_training_it_is_the_one_shot_walk(plan, dense_target):
    model = Blocks().train()
    pruned, data = copy.deepcopy(model), batches(4)
    if plan.start < plan.freeze:
        data = [data[0]] * 4  # then every block is solved on the same inputs, whatever its turn
    seen = data if plan.start == plan.freeze else data[:1]
    report = prune_layerwise(
        pruned, seen, dense_target=dense_target, skip=["embed", "out"], steps=STEPS, progress=False
    )
    engine = engine_for(model, plan, dense_target=dense_target, reconstruction_steps=0)
    train(model, engine, data)
    assert set(engine.masks) == set(report.masks)
    for name, mask in report.masks.items():
        assert torch.equal(engine.masks[name], mask), name
    for (name, value), expected in zip(model.named_parameters(), pruned.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-4), name
    assert all(module.training for module in model.modules()), "the mode of every module comes back"


def test_layers_solved_for_what_tokens_count_leave_a_smaller_error_of_the_block():
    """A few tokens of huge norm fill the Hessian, and count no more than others in what the block returns."""
    dense, (data, *_) = Blocks(), batches(1)
    data[::8] *= 30
    errors = {}
    for share in (0.0, 1.0):
        model = copy.deepcopy(dense)
        train(model, engine_for(model, PhasePlan(1, 1), reconstruction_steps=0, token_weighting=share), [data])
        with torch.no_grad():
            x = dense.embed(data)
            outputs = [each.blocks[0].eval()(x, shift=0.0) for each in (model, dense)]
        errors[share] = float(relative_error(*outputs))
    assert errors[1.0] < 0.9 * errors[0.0], errors


def test_a_share_of_token_weighting_lies_between_none_and_all(monkeypatch):
    found = []

    def note(group, runs, *args, token_weights, **options):
        found[-1] += [counts for by_layer in token_weights for layer in group.layers for counts in by_layer[layer]]
        return input_group_hessian(group, runs, *args, token_weights=token_weights, **options)

    monkeypatch.setattr(solve_block, "input_group_hessian", note)
    for share in (0.25, 1.0):
        found.append([])
        model = Blocks()
        train(model, engine_for(model, PhasePlan(1, 1), reconstruction_steps=0, token_weighting=share), batches(1))
    first, whole = (calls[:2] for calls in found)  # of layers that no pruned layer comes before
    for some, every in zip(first, whole, strict=True):
        assert every.std() > 0.1
        torch.testing.assert_close(some, 0.75 + 0.25 * every)


def test_a_group_counts_tokens_by_the_mean_over_its_layers():
    layers, x = (nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    counts = {layers[0]: [torch.tensor([1.0, 2.0, 0.0])], layers[1]: [torch.tensor([3.0, 0.0, 0.0])]}
    group = InputGroup(layers, once=True)
    hessian = input_group_hessian(group, [lambda: layers[0](x)], token_weights=[counts]).hessian
    torch.testing.assert_close(hessian, (2 * x[:1].T @ x[:1] + x[1:2].T @ x[1:2]) / 3)


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_reconstruction_brings_the_pruned_model_closer_to_the_dense_one(dense_target):
    dense, data = Blocks().eval(), batches(4)
    errors = {}
    for steps in (0, 40):
        model = copy.deepcopy(dense).train()
        engine = engine_for(model, PhasePlan(4, 4), dense_target=dense_target, reconstruction_steps=steps)
        train(model, engine, data)
        for weight in engine.weights:
            assert not weight.parameter[~engine.masks[weight.name]].any(), weight.name
        assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())
        model.eval()
        with torch.no_grad():
            errors[steps] = sum(float((model(x) - dense(x)).square().mean()) for x in data)
    assert errors[40] < 0.9 * errors[0], errors


def test_a_block_goes_as_a_whole_and_loose_layers_in_their_place():
    model = Blocks()
    engine = engine_for(model, PhasePlan(2, 12), targets=("*", "out"), skip=(), batches=2)
    seen = train(model, engine, batches(13), lr=0.1)
    inside = {i: {f"blocks.{i}.{layer}.weight" for layer in ("gate", "up", "down")} for i in range(3)}
    turns = [seen[step - 1] - seen[step - 2] for step in (4, 6, 8, 10, 12)]
    assert turns == [{"embed.weight"}, inside[0], inside[1], inside[2], {"out.weight"}]


class Counted(nn.Linear):
    passes = 0

    def forward(self, x):
        Counted.passes += not torch.is_grad_enabled()
        return super().forward(x)


def test_blocks_that_share_a_turn_share_the_passes_of_the_batches():
    passes = []
    for plan in (PhasePlan(3, 3), PhasePlan(0, 24)):
        model = Blocks()
        engine = engine_for(model, plan, dense_target=0.0, reconstruction_steps=0)
        model.embed.__class__ = Counted
        Counted.passes = 0
        train(model, engine, batches(plan.freeze + 1))
        passes.append(Counted.passes)
    # Three to see that the model can be called again, one for the order; then three batches in one pruning step, or in
    # each of three the last eight.
    assert passes == [3 + 1 + 3, 3 + 1 + 3 * 8]


class CountedBlock(Block):
    runs = 0

    def forward(self, x, shift=None):
        output = super().forward(x, shift)
        CountedBlock.runs += not torch.is_grad_enabled()
        return output


def test_of_all_blocks_of_one_pause_each_batch_is_run_through_the_model_once():
    blocks, recorded = 6, 3
    model = Blocks(blocks)
    engine = engine_for(model, PhasePlan(recorded, recorded), dense_target=0.5, reconstruction_steps=0)
    for block in model.blocks:
        block.__class__ = CountedBlock
    CountedBlock.runs = 0
    train(model, engine, batches(recorded + 1))
    # Three runs of the model to see that it can be called again, one for the order, two to check the dense reference.
    before = (3 + 1 + 2) * blocks
    # In the model and in its dense reference: the first batch goes to its end, others up to the last block.
    rerun = 2 * (1 + recorded * (blocks - 1))
    # Each block but the last one runs to reach the next; in the dense reference one run gives its layers' inputs too.
    passed_on = recorded * (blocks - 1)
    dense = recorded * blocks
    # One run of each block finds the layers that share an input. Those for the Hessians end inside the block.
    assert CountedBlock.runs == before + rerun + passed_on + dense + blocks


def test_inputs_of_the_dense_reference_that_memory_does_not_hold_are_rerun(monkeypatch):
    """Kept from one run of each block, or rerun for each input group: the same weights to the last bit."""
    found = []
    for limit in (dense_block._KEPT_ON_CPU, 0):
        monkeypatch.setattr(dense_block, "_KEPT_ON_CPU", limit)
        torch.manual_seed(0)
        model = Blocks()
        train(model, engine_for(model, PhasePlan(3, 3), dense_target=0.5, reconstruction_steps=4), batches(4))
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_gradient_weighting_can_be_turned_off_and_changes_the_values_alone():
    found = []
    for options in ({}, {"gradient_weighting": False}, {"reconstruction_steps": 0}):
        torch.manual_seed(0)
        model = Blocks()
        engine = engine_for(model, PhasePlan(1, 4), **options)
        train(model, engine, batches(5))
        found.append(engine.masks | {"value": model.blocks[2].down.weight.detach()})
    assert not torch.equal(found[0]["value"], found[1]["value"])
    first = "blocks.0.gate.weight"
    assert torch.equal(found[0][first], found[1][first])
    assert torch.equal(found[0][first], found[2][first])


def test_a_run_resumed_between_recorded_batches_ends_like_the_unbroken_one(tmp_path):
    data, plan = batches(14), PhasePlan(1, 12)

    def run(model, engine, optimizer, part):
        engine.bind([optimizer])
        for x in part:
            engine.before_batch()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        engine.unbind()

    def parts():
        model = Blocks().eval()  # no dropout, so that nothing but the state decides
        return model, engine_for(model, plan, batches=4), torch.optim.SGD(model.parameters(), lr=0.05)

    whole = parts()
    run(*whole, data)
    first = parts()
    run(*first, data[:10])
    assert first[1].strategy.state_dict()["calibration"]["gradients"][0], "in the middle of what a block gathers"
    torch.save([first[0].state_dict(), first[1].state_dict()], tmp_path / "state.pt")
    model, engine, optimizer = parts()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(weights)
    engine.load_state_dict(state)
    run(model, engine, optimizer, data[10:])
    assert engine.phase == "frozen"
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_parts_that_are_called_one_by_one():
    model = Parts()
    engine = SparsityEngine(
        select_weights(model).chosen,
        PhasePlan(1, 11),
        Progressive(model, root_is_called=False, prox_steps=STEPS, batches=2),
    )
    seen = train(model, engine, batches(12), call=model.training_step, lr=0.1)
    assert seen[-2] - seen[-3] == {"second.weight"}
    assert engine.strategy.state_dict()["calibration"] == {}, "nothing is kept after the freeze"


def test_a_part_that_is_never_called_is_looked_into():
    model = Unwrapped()
    engine = SparsityEngine(
        select_weights(model, skip=["*.embed", "*.out"]).chosen,
        PhasePlan(3, 6),
        Progressive(model, root_is_called=False, prox_steps=STEPS, batches=1),
    )
    train(model, engine, batches(5), call=model.training_step, lr=0.1)
    state = engine.strategy.state_dict()["calibration"]
    assert state["hooked"] == ["inner.blocks.0", "inner.blocks.1", "inner.blocks.2"]
    assert all(hooked["called"] for hooked in state["calls"][0])
    assert len(engine.masks) == 6, "two of three blocks have had their turn"


def test_validation_is_not_recorded():
    model = Blocks()
    engine = engine_for(model, PhasePlan(0, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine.bind([optimizer])
    engine.before_batch()
    with torch.no_grad():
        model(batches(1)[0])
    model(batches(2)[1]).sum().backward()
    assert [len(batch) for batch in engine.strategy.state_dict()["calibration"]["calls"][0][0]["batches"]] == [1]


def test_what_is_recorded_is_out_of_reach_of_changes_in_place():
    model = Blocks()
    engine = engine_for(model, PhasePlan(0, 8))
    engine.bind([torch.optim.SGD(model.parameters(), lr=0.0)])
    engine.before_batch()
    x = batches(1)[0]
    model(x)
    x.zero_()
    recorded = engine.strategy.state_dict()["calibration"]["calls"][0][0]["batches"][0][0]["args"][0]
    assert recorded.abs().sum() > 0


def test_a_forward_set_on_an_instance_does_not_lead_the_dense_copy_astray():
    model, plain = Blocks(), Blocks()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    for one in (model, plain):
        torch.manual_seed(0)  # dropout decides which gradients the outputs' features get
        train(one, engine_for(one, PhasePlan(1, 4)), batches(4))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("dropout, graphs", [(0.0, 1), (0.5, 2)])
def test_what_training_compiled_serves_reconstruction_where_the_mode_makes_no_difference(dropout, graphs):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model = Blocks()
    for block in model.blocks:
        block.dropout.p = dropout
        block.forward = torch.compile(block.forward, backend=backend)
    engine = engine_for(model, PhasePlan(1, 4), batches=1, dense_target=0.0)
    train(model, engine, batches(5))
    assert len(compiled) == graphs, "the blocks share their code"
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": 0}, "batches=0 must be at least 1"),
        ({"dense_target": 1.5}, r"dense_target=1.5 must lie in \[0, 1\]"),
        ({"reconstruction_steps": -1}, "reconstruction_steps=-1 must be 0 or more"),
        ({"damping": 0.0}, "damping=0.0 must be above 0"),
        ({"token_weighting": 1.5}, r"token_weighting=1.5 must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Progressive(nn.Linear(4, 4), **options)
