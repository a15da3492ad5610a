"""A copy takes the weights along and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prox24_lightning.utils.module_copy import bare_copy, cast_model, move_inputs

CPU = torch.device("cpu")


class Uncopyable:
    def __deepcopy__(self, memo):
        raise AssertionError("was copied")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4, bias=False)
        self.tied = nn.Linear(8, 4, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x, *, scale=1.0):
        return self.head(self.body(x)) * scale


def test_a_copy_is_detached_cast_and_tied():
    net = Net().train()
    net(torch.randn(4, 8)).sum().backward()
    twin = bare_copy(net, device=CPU, dtype=torch.bfloat16)
    assert twin.tied.weight is twin.head.weight
    assert not twin.training
    for name, parameter in twin.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter.data_ptr() != net.get_parameter(name).data_ptr()
    assert twin.body[1].running_mean.dtype == torch.bfloat16
    assert twin.body[1].num_batches_tracked.dtype == torch.int64
    assert net.training
    assert net.head.weight.grad is not None


def test_tables_of_transformers_stay_in_float32():
    """Of others they are cast: what they are added to is not known to cast them back."""
    net = nn.Sequential(LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2)), nn.Linear(4, 4))
    net.register_buffer("inv_freq", torch.ones(3), persistent=False)
    expected = net[0].inv_freq.clone()
    for twin in (bare_copy(net, dtype=torch.bfloat16), cast_model(net, torch.bfloat16)):
        assert twin[0].inv_freq.dtype == torch.float32
        assert torch.equal(twin[0].inv_freq, expected)
        assert twin.inv_freq.dtype == twin[1].weight.dtype == torch.bfloat16


def test_a_copy_in_the_same_dtype_is_still_a_copy():
    net = Net()
    twin = bare_copy(net, device=CPU)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert net.head.weight.abs().sum() > 0


def test_hooks_and_what_they_hold_stay_behind():
    net = Net()
    owner = Uncopyable()
    owner.hook = lambda module, args, output: calls.append(1)
    calls = []

    class Watcher(Uncopyable):
        def look(self, module, args, output):
            calls.append(module)

    net.body.register_forward_hook(Watcher().look)
    twin = bare_copy(net, device=CPU)
    twin(torch.randn(2, 8))
    assert calls == []
    net.eval()(torch.randn(2, 8))
    assert len(calls) == 1


def test_shared_things_are_shared():
    net = Net()
    net.trainer = Uncopyable()
    twin = bare_copy(net, device=CPU, shared=[net.trainer])
    assert twin.trainer is net.trainer


def test_compiled_modules_are_copied_as_what_they_were_made_from():
    net = Net().eval()
    x = torch.randn(2, 8)
    expected = net(x)
    net.body = torch.compile(net.body, backend="eager")
    net.head.compile(backend="eager")
    twin = bare_copy(torch.compile(net, backend="eager"), device=CPU)
    assert type(twin) is Net
    assert type(twin.body) is nn.Sequential
    assert twin.head._compiled_call_impl is None
    assert torch.equal(twin(x), expected)
    assert hasattr(net.body, "_orig_mod"), "the original stays compiled"
    assert net.head._compiled_call_impl is not None


def test_the_original_is_whole_again_when_copying_fails():
    net = Net()
    net.register_forward_hook(lambda *args: None)
    net.secret = Uncopyable()
    with pytest.raises(AssertionError, match="was copied"):
        bare_copy(net, device=CPU)
    assert len(net._forward_hooks) == 1


def test_a_sharded_parameter_is_refused():
    net = Net()
    net.head.weight.placements = ()
    with pytest.raises(ValueError, match=r"head\.weight is sharded over ranks"):
        bare_copy(net, device=CPU)


def test_inputs_move_floats_only_and_keep_their_structure():
    class Batch:
        def to(self, device):
            self.device = device
            return self

    found = move_inputs(
        ({"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.long)}, [Batch(), "text", None]),
        device=CPU,
        dtype=torch.float16,
    )
    assert found[0]["x"].dtype == torch.float16
    assert found[0]["ids"].dtype == torch.int64
    assert found[1][0].device == CPU
    assert found[1][1:] == ["text", None]


def test_a_module_that_is_shared_with_its_copy_is_refused_and_stays_in_its_mode():
    class Shared(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(nn.Linear(4, 4), Shared(4, 4))
    with pytest.raises(ValueError, match="Sequential cannot be copied: the copy would hold the same Shared"):
        bare_copy(model)
    assert all(module.training for module in model.modules())
