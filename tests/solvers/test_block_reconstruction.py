"""Block reconstruction: lower error of the block's output, masks held, nothing made worse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.statistics.output_error import relative_error
from prox24_lightning.mask import mask_24
from prox24_lightning.solvers import block_reconstruction
from prox24_lightning.solvers.block_reconstruction import reconstruct_block
from prox24_lightning.utils.devices.cuda_graphs import _log_once


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def pruned_block(dtype=torch.float32):
    """A block pruned by magnitude: parameters, masks, the block, batches and targets of the dense one."""
    torch.manual_seed(0)
    dense = Block()
    block = copy.deepcopy(dense).to(dtype)
    masks = {}
    for name in ("up.weight", "down.weight"):
        weight = block.get_parameter(name)
        masks[name] = mask_24(weight)
        weight.data.mul_(masks[name])
    inputs = [torch.randn(4, 32, 16) for _ in range(3)]
    targets = [dense(x).detach() for x in inputs]
    return dict(block.named_parameters()), masks, block, [x.to(dtype) for x in inputs], targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_falls_and_the_masks_hold(dtype):
    parameters, masks, block, inputs, targets = pruned_block(dtype)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before, after = reconstruct_block(block, masks, block, inputs, targets, steps=100)
    assert after < 0.8 * before
    errors = [float(relative_error(block(x).detach(), target)) for x, target in zip(inputs, targets, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(after, rel=1e-5)
    for name, parameter in parameters.items():
        assert parameter.dtype is dtype
        assert parameter.grad is None, "what the training gathered is not touched"
        if name in masks:
            assert not parameter[~masks[name]].any(), name
        changed = not torch.equal(parameter, start[name])
        assert changed is not name.startswith("unused"), name


def test_what_would_be_worse_is_undone():
    parameters, masks, block, inputs, targets = pruned_block()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before, after = reconstruct_block(block, masks, block, inputs, targets, steps=1, learning_rate=30.0)
    assert after == before
    assert all(torch.equal(parameter, start[name]) for name, parameter in parameters.items())


def test_steps_that_are_too_large_are_tried_again_smaller():
    parameters, masks, block, inputs, targets = pruned_block()
    before, after = reconstruct_block(block, masks, block, inputs, targets, steps=12, learning_rate=1.0)
    assert after < 0.5 * before
    assert all(not parameters[name][~mask].any() for name, mask in masks.items())


def test_a_token_of_huge_norm_counts_like_any_other():
    target = torch.ones(1, 8, 4)
    target[0, 0] *= 1000
    output = target * 1.1
    assert float(relative_error(output, target)) == pytest.approx(0.01, rel=1e-3)
    one_wrong = target.clone()
    one_wrong[0, 3] = 0
    assert float(relative_error(one_wrong, target)) == pytest.approx(1 / 8)


def test_features_that_count_more_come_closer():
    errors = []
    for weights in (None, torch.tensor([100.0] * 2 + [1.0] * 14)):
        _, masks, block, inputs, targets = pruned_block()
        reconstruct_block(block, masks, block, inputs, targets, steps=100, feature_weights=weights, learning_rate=0.03)
        gaps = [
            (block(x).detach() - target).square()[..., :2].mean() for x, target in zip(inputs, targets, strict=True)
        ]
        errors.append(sum(gaps))
    assert errors[1] < 0.7 * errors[0]


def test_training_sees_nothing_of_it():
    parameters, masks, block, inputs, targets = pruned_block()
    seen = []
    for parameter in parameters.values():
        parameter.register_hook(seen.append)
    block.norm.bias.requires_grad_(False)
    reconstruct_block(block, masks, block, inputs, targets, steps=4)
    assert not seen
    assert all(block.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(dict(block.named_parameters())) == list(parameters)
    assert not block.norm.bias.any(), "what does not train stays as it is"


class Waits(Block):
    """Looks at a value on the device, so that its steps cannot be captured."""

    def forward(self, x):
        return super().forward(x) * (1.0 if float(x.sum()) == float(x.sum()) else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Block, Waits])
def test_the_gpu_ends_at_the_error_of_the_cpu(kind):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        dense = kind()
        block = copy.deepcopy(dense).to(device)
        masks = {name: mask_24(block.get_parameter(name)) for name in ("up.weight", "down.weight")}
        for name, mask in masks.items():
            block.get_parameter(name).data.mul_(mask)
        inputs = [torch.randn(tokens, 32, 16) for tokens in (4, 4, 2)]
        targets = [dense(x).detach().to(device) for x in inputs]
        inputs = [x.to(device) for x in inputs]
        found.append(reconstruct_block(block, masks, block, inputs, targets, steps=100))
        assert all(not block.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.gpu
def test_it_is_recorded_while_the_graph_of_a_training_step_is_alive(caplog):
    _log_once.cache_clear()
    parameters, masks, block, inputs, targets = pruned_block()
    block.cuda()
    inputs, targets = [x.cuda() for x in inputs], [target.cuda() for target in targets]
    masks = {name: mask.cuda() for name, mask in masks.items()}
    loss = block(inputs[0]).square().mean()
    loss.backward()
    with caplog.at_level("INFO"):
        before, after = reconstruct_block(block, masks, block, inputs, targets, steps=100)
    assert after < 0.8 * before
    assert "cannot be captured" not in caplog.text
    assert loss.grad_fn is not None
    assert set(parameters) == set(dict(block.named_parameters()))


@pytest.mark.parametrize("weighted", [False, True])
def test_float64_keeps_its_precision(weighted):
    parameters, masks, block, inputs, targets = pruned_block(torch.float64)
    block.norm.float()
    inputs = [x.float() for x in inputs]

    def forward(x):
        return x + block.down(torch.tanh(block.up(block.norm(x).double())))

    before, after = reconstruct_block(
        block, masks, forward, inputs, targets, steps=20, feature_weights=torch.ones(16) if weighted else None
    )
    assert after < before
    for name in masks:
        value = parameters[name].detach()[masks[name]]
        assert (value != value.float()).float().mean() > 0.9, name


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_user_changes_nothing(default):
    found = []
    for dtype in (torch.float32, default):
        parameters, masks, block, inputs, targets = pruned_block()
        torch.set_default_dtype(dtype)
        try:
            reconstruct_block(block, masks, block, inputs, targets, steps=20)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([parameter.detach() for parameter in parameters.values()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("lengths", [[4] * 8, [7, 1] * 4, [1, 7] * 4, [1] * 7 + [25], [2] * 4])
def test_parts_that_judge_hold_enough_tokens_whatever_their_lengths(monkeypatch, lengths):
    monkeypatch.setattr(block_reconstruction, "_JUDGED_TOKENS", 16)
    parts = [(number, torch.empty(0), torch.empty(length)) for number, length in enumerate(lengths)]
    judged = [number for number, _, _ in block_reconstruction._judged_parts(parts)]
    assert len(set(judged)) == len(judged)
    assert sum(lengths[number] for number in judged) >= min(16, sum(lengths))
    if lengths == [4] * 8:
        assert judged == [0, 2, 4, 6]


def test_every_rank_judges_by_as_many_parts(monkeypatch):
    """A block that makes collective calls, as SyncBatchNorm does, would wait for the other ranks else."""
    monkeypatch.setattr(block_reconstruction, "gathered_objects", lambda mine: [mine, 5])
    parts = [(number, torch.empty(0), torch.empty(1 << 15)) for number in range(8)]
    assert len(block_reconstruction._judged_parts(parts)) == 5
