"""What an optimizer remembers of a weight follows masks and written values, or is left alone where zeros would harm."""

from __future__ import annotations

import pytest
import torch
from odd_optimizers import (
    MasterList,
    Masters,
    Orthogonal,
    OuterMasters,
    Rotated,
    ScheduleFree,
    Shampoo,
    SharpnessAware,
    SlowWeights,
)
from torch import nn

from prox24_lightning.finetune import MaskedParameters, load_masks, save_masks
from prox24_lightning.finetune.optimizer_state import OptimizerState
from prox24_lightning.finetune.optimizers import check_optimizer, masters_of, wrapped_optimizers
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.selection import select_weights

ADAM = {"step": "other", "exp_avg": "moment", "exp_avg_sq": "moment"}
KINDS = {
    "adam": (torch.optim.Adam, ADAM),
    "amsgrad": (
        lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True, foreach=True),
        {**ADAM, "max_exp_avg_sq": "moment"},
    ),
    "fused": (lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), ADAM),
    "momentum": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), {"momentum_buffer": "moment"}),
    "adagrad": (torch.optim.Adagrad, {"step": "other", "sum": "moment"}),
    "adafactor": (torch.optim.Adafactor, {"step": "other", "row_var": "other", "col_var": "other"}),
    "asgd": (torch.optim.ASGD, {"step": "other", "eta": "other", "mu": "other", "ax": "copy"}),
    "masters": (Masters, {"master": "copy"}),
    "slow weights": (lambda p, lr: SlowWeights(torch.optim.Adam(p, lr=lr)), {"slow": "copy", **ADAM}),
    "schedule-free": (ScheduleFree, {"z": "copy"}),
    "shampoo": (Shampoo, {"left": "other", "right": "other"}),
    "rotated": (Rotated, {"step": "other", "exp_avg": "other", "exp_avg_sq": "other", "bases": "other"}),
    "orthogonal": (Orthogonal, {"momentum_buffer": "moment"}),
}


def trained(make, shapes=((16, 16), (8, 16)), steps=6, lr=1e-3):
    """A chain of linear layers after a few steps, with its optimizer and a function that takes one more step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes))
    optimizer = make(model.parameters(), lr=lr)
    batch = torch.randn(32, shapes[0][1])

    def step():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


def prune(model, optimizer):
    """Write other values into the weights as a solver does, and apply masks."""
    masked = MaskedParameters()
    weights = {name: value for name, value in model.named_parameters() if value.ndim == 2}
    masks = {name: mask_24(value.detach()) for name, value in weights.items()}
    with torch.no_grad(), masked.carry_writes([optimizer]):
        for name, value in weights.items():
            value.copy_(torch.where(masks[name], 1.5 * value, 0.0))
    for name, value in weights.items():
        masked.apply(name, value, masks[name])
    masked.mask_optimizer_state([optimizer])
    return masked


@pytest.mark.parametrize("name", KINDS)
def test_the_kinds_of_state(name):
    make, kinds = KINDS[name]
    _, optimizer, _ = trained(make)
    assert OptimizerState(optimizer).kinds == kinds


@pytest.mark.parametrize("name", KINDS)
def test_solved_values_last_and_pruned_entries_stay_zero(name):
    model, optimizer, step = trained(KINDS[name][0], lr=1e-6)
    masked = prune(model, optimizer)
    solved = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(10):
        step()
        masked.after_step(optimizer)
        for key, value in model.named_parameters():
            assert (value[~masked.masks[key]] == 0).all()
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, solved[key], rtol=1e-3, atol=1e-4)


def test_square_weights_alone_leave_unknown_state_as_it_is():
    model, optimizer, _ = trained(Shampoo, shapes=((16, 16), (16, 16)))
    before = optimizer.state[model[0].weight]["left"].clone()
    prune(model, optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["left"], before)


def test_moments_of_a_rotated_basis_are_left_as_they_are():
    model, optimizer, _ = trained(Rotated)
    before = optimizer.state[model[1].weight]["exp_avg_sq"].clone()
    prune(model, optimizer)
    assert torch.equal(optimizer.state[model[1].weight]["exp_avg_sq"], before)


def test_weights_in_evaluation_mode_of_a_schedule_free_optimizer_are_pruned_too():
    model, optimizer, step = trained(ScheduleFree, lr=0.1)
    masked = prune(model, optimizer)
    for _ in range(3):
        step()
        masked.after_step(optimizer)
    optimizer.eval()
    for key, value in model.named_parameters():
        assert (value[~masked.masks[key]] == 0).all()
        assert (value[masked.masks[key]] != 0).all()


def test_slow_weights_over_dense_updates_stay_pruned():
    model, optimizer, step = trained(lambda p, lr: SlowWeights(Orthogonal(p, lr=lr)))
    masked = prune(model, optimizer)
    for _ in range(10):
        step()
        masked.after_step(optimizer)
    for key, value in model.named_parameters():
        assert (optimizer.state[value]["slow"][~masked.masks[key]] == 0).all()


def test_a_copy_that_was_the_weight_becomes_the_written_weight_exactly():
    model, optimizer, _ = trained(Masters)
    prune(model, optimizer)
    for value in model.parameters():
        assert torch.equal(optimizer.state[value]["master"], value)


def test_other_copies_keep_their_distance():
    model, optimizer, _ = trained(lambda p, lr: SlowWeights(torch.optim.SGD(p, lr=0.1)), steps=3)
    weight, slow = model[0].weight, optimizer.state[model[0].weight]["slow"]
    distance = (slow - weight).detach()
    assert distance.abs().max() > 0
    with torch.no_grad(), OptimizerState(optimizer).carry_writes():
        weight.add_(1.0)
    torch.testing.assert_close((slow - weight).detach(), distance)


def test_a_copy_is_moved_once_whoever_shares_it():
    model, optimizer, _ = trained(lambda p, lr: SharpnessAware(p, torch.optim.SGD, lr=lr), steps=0)
    weight = model[0].weight
    optimizer.state[weight]["old"] = weight.detach()  # shares the weight's memory, as after `p.data = old`
    optimizer.base.state = optimizer.state
    before = weight.detach().clone()
    with torch.no_grad(), OptimizerState(optimizer).carry_writes():
        weight.add_(1.0)
    assert torch.equal(weight, before + 1.0)


def test_the_zero_of_eight_bit_moments_is_a_code():
    model, optimizer, _ = trained(torch.optim.Adam, steps=0)
    codes = torch.arange(-127, 128) / 127
    for value in model.parameters():
        optimizer.state[value] = {
            "state1": torch.full(value.shape, 200, dtype=torch.uint8),
            "qmap1": codes,
            "flags": torch.full(value.shape, 3, dtype=torch.uint8),
        }
    masked = prune(model, optimizer)
    for key, value in model.named_parameters():
        state, gone = optimizer.state[value], ~masked.masks[key]
        assert (codes[state["state1"][gone].int()] == 0).all()
        assert (state["state1"][~gone] == 200).all()
        assert (state["flags"] == 3).all()


def test_masters_are_found_by_their_values():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 8).bfloat16()) for _ in range(3)]
    outside = OuterMasters(weights[:2], lr=0.1)
    own = torch.optim.SGD([weights[2], nn.Parameter(torch.randn(4, 8))], lr=0.1)
    masters = masters_of([own, outside], weights)
    assert {id(weight): id(master) for weight, master in masters.items()} == dict(
        zip(map(id, weights), map(id, outside.param_groups[0]["params"]), strict=False)
    )


def test_masters_in_an_attribute_follow_all_parameters_that_are_written():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        nn.init.zeros_(layer.bias)
    optimizer = MasterList(model.parameters(), lr=0.0)
    state = OptimizerState(optimizer)
    assert state.kinds == {"master": "copy"}
    with torch.no_grad(), state.carry_writes():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(number)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), optimizer.fp32[0], strict=True))


def test_masks_of_a_file_reach_masters_and_their_moments(tmp_path):
    model = nn.Linear(16, 8, bias=False)
    optimizer = OuterMasters(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 16)).square().sum().backward()
        optimizer.step()

    step()
    mask = mask_24(model.weight.detach())
    save_masks(tmp_path / "masks.safetensors", select_weights(model), {"weight": mask})
    load_masks(model, tmp_path / "masks.safetensors", optimizers=optimizer, expect="any")
    (master,) = optimizer.param_groups[0]["params"]
    for _ in range(3):
        assert (master[~mask] == 0).all()
        assert (optimizer.state[master]["momentum_buffer"][~mask] == 0).all()
        step()
        assert (model.weight[~mask] == 0).all()


def test_enforced_masks_follow_the_half_steps_of_a_wrapper():
    model = nn.Linear(16, 8, bias=False)
    sam = SharpnessAware(model.parameters(), Orthogonal, lr=0.1)
    masked, mask = MaskedParameters(), mask_24(model.weight.detach())
    masked.apply("weight", model.weight, mask)
    masked.enforce([sam])
    for _ in range(3):
        for half in (sam.first_step, sam.second_step):
            model(torch.randn(4, 16)).square().sum().backward()
            half()
        assert (model.weight[~mask] == 0).all()


def test_wrapped_optimizers_are_found_once():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(4))], lr=0.1)
    outer = SlowWeights(inner)
    outer.others = {"again": inner, "wrapper": outer}
    assert wrapped_optimizers(outer) == [outer, inner]


@pytest.mark.parametrize("name", ["LBFGS", "FTRL", "Lomo", "DistributedFusedAdam"])
def test_optimizers_that_cannot_work_are_refused_by_name(name):
    inner = type(name, (torch.optim.SGD,), {})([nn.Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises(ValueError, match=f"cannot work with {name}: it .*; use SGD, Adam or AdamW"):
        check_optimizer(SlowWeights(inner))


def test_an_optimizer_without_step_hooks_is_refused():
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

    with pytest.raises(ValueError, match="step hooks .* which Bare lacks; derive it"):
        check_optimizer(Bare([nn.Parameter(torch.zeros(4))]))
